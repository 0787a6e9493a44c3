"""A table from a tiny model, with the real processes: one run by torchrun on two devices, one begun before and gone on with."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from rode.cli import main
from rode.training.config import dump_experiment, load_experiment
from rode.training.train import train
from rode_food.atomic import write_text

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_a_table_from_a_tiny_model(capsys, monkeypatch, tmp_path, llava_dir, food):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "python"), str(ROOT)]))
    base = tmp_path / "tiny.yaml"
    training = {
        "batch_size": 2,
        "gradient_accumulation": 1,
        "warmup_steps": 1,
        "max_steps": 4,
        "save_steps": 2,
    }
    values = {
        "name": "tiny",
        "model": {"path": str(llava_dir), "device": "cpu", "dtype": "float32", "prompt": "vicuna"},
        "data": {"sources": [{"path": str(food / "records.jsonl")}], "wording": "first"},
        "training": {**training, "logging_steps": 1},
        "evaluation": {"max_new_tokens": 8},
    }
    base.write_text(yaml.safe_dump(values))
    folders = ["--results", tmp_path / "results", "--runs", tmp_path / "runs"]
    argv = ["reproduce", "fig6", "--configs", ROOT / "configs" / "paper", "--base", base, *folders, "--quiet"]
    argv = list(map(str, argv))

    # the relu run is there as far as its first checkpoint, as a stop would leave it
    folder = tmp_path / "runs" / "tiny" / "relu-8888-seed0"
    experiment = load_experiment(
        ROOT / "configs" / "paper" / "relu-8888.yaml", [f"output_dir={folder}"], base=base
    )
    experiment.training.max_steps = 2
    train(experiment, progress=False)
    (folder / "training.json").unlink()
    experiment.training.max_steps = 4
    write_text(folder / "config.yaml", dump_experiment(experiment))

    assert main([*argv, "--only", "relu-8888"]) == 0
    launcher = shlex.join([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"])
    assert main([*argv, "--only", "softmax-8888", "--launcher", launcher]) == 0
    found = {
        name: json.loads((tmp_path / "results" / "tiny" / name / "seed-0.json").read_text())
        for name in ("relu-8888", "softmax-8888")
    }
    assert [entry["command"].split()[3] for entry in found["relu-8888"]["commands"]] == ["train", "evaluate"]
    assert " --resume" in found["relu-8888"]["commands"][0]["command"]
    # what went before is part of the run's log
    assert [step for step, _ in found["relu-8888"]["loss"]] == [1, 2, 3, 4]
    assert found["softmax-8888"]["machine"].startswith("2 x cpu")
    for name, result in found.items():
        assert result["steps"] == 4
        # two layers of q (32 -> 32) and v (32 -> 16), ranks 32 together, router of four rows
        assert result["trainable_parameters"] == 2 * (32 * 64 + 4 * 32 + 32 * 48 + 4 * 32) == 7680, name
        assert result["gates"]["all"]["blocks"] == [0, 1]
    softmax = found["softmax-8888"]["gates"]["all"]["mean_gate"]
    assert [sum(row) for row in softmax] == pytest.approx([1.0, 1.0], abs=1e-4)
    assert "7,680" in capsys.readouterr().out
    assert (tmp_path / "results" / "tiny" / "fig6.png").is_file()
