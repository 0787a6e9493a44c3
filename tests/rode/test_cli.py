"""The command: help, exit codes, errors in one line, and the way from records to an answer."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rode import cli
from rode.cli import main
from rode.training.checkpoints import latest_checkpoint
from rode.tuner.fingerprint import AdapterMismatch
from rode_food.vocabulary import Vocabulary

CONFIG = """
name: cli
output_dir: {out}
model: {{path: {model}, device: cpu, dtype: float32, prompt: vicuna, vision_features: memory}}
data: {{sources: [{{path: {records}}}]}}
adapter: {{ranks: [2, 3]}}
training: {{batch_size: 4, gradient_accumulation: 1, warmup_steps: 1, max_steps: 2, save_steps: 100}}
evaluation: {{max_new_tokens: 3}}
"""


@pytest.fixture
def config(tmp_path, llava_dir, food):
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(out=tmp_path / "run", model=llava_dir, records=food / "records.jsonl"))
    return str(file)


def fails(capsys, argv, message, code=1):
    assert main(argv) == code
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rode: ")
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["train"],
        ["evaluate"],
        ["generate"],
        ["serve"],
        ["analyze"],
        ["reproduce"],
        ["compose"],
        ["fit-clusters"],
        ["data"],
        ["data", "convert"],
    ],
)
def test_help(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([*command, "--help"])
    assert exit.value.code == 0
    assert "usage: rode" in capsys.readouterr().out


def shown_commands():
    """Every `rode` command in the help texts and in some pages of docs/."""
    texts = [cli.TOP, *(module.DESCRIPTION for module in cli.MODULES)]
    docs = Path(__file__).parents[2] / "docs"
    texts += [(docs / page).read_text() for page in ("training.md", "analysis.md", "reproduce.md")]
    lines = [
        line.split("   ")[0].strip()
        for text in texts
        for line in re.sub(r"\\\n\s+", "", text).splitlines()  # a command may go on in the next line
        if line.startswith(("  ", "rode", "torchrun"))
    ]
    return [
        line.partition("-m rode ")[2] or line for line in lines if line.startswith(("rode ", "torchrun "))
    ]


@pytest.mark.parametrize("command", shown_commands())
def test_what_is_shown_can_be_typed(command):
    cli._parse(shlex.split(command.removeprefix("rode ")))


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["trian"],
        ["train"],
        ["generate", "--image", "a.png"],
        ["generate", "--image", "a.png", "--task", "soup"],
        ["generate", "--image", "a.png", "--task", "recipe", "--question", "What?"],
        ["train", "r.yaml", "--quiet", "training.seed"],
        ["train", "r.yaml", "--quick", "training.seed=1"],
        ["generate", "--image", "a.png", "--task", "recipe", "a=b"],
        ["evaluate", "r.yaml", "--limit", "0"],
        ["evaluate", "r.yaml", "--split", "dev"],
    ],
)
def test_wrong_usage_is_2(capsys, argv):
    with pytest.raises(SystemExit) as exit:
        main(argv)
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_errors_are_one_line_with_the_mend(capsys, config, tmp_path, food):
    image = str(food / "1.png")
    fails(capsys, ["train", "none.yaml"], "none.yaml: no such config")
    fails(
        capsys,
        ["train", config, "training.max_stepz=1"],
        "training.max_stepz: no such key; did you mean max_steps",
    )
    fails(capsys, ["train", config, "--resume"], "no checkpoint to resume from; leave --resume out")
    fails(capsys, ["train", config, "--resume", str(tmp_path)], "trainer_state.json is missing")
    fails(capsys, ["train", config, "model.path=/nowhere"], "/nowhere: no such model directory")
    fails(capsys, ["train", config, "data.sources.0.path=/nowhere.jsonl"], "/nowhere.jsonl")
    fails(capsys, ["evaluate", config, "--quiet"], "no adapter here")
    fails(capsys, ["evaluate"], "nothing to evaluate on: give a CONFIG")
    fails(capsys, ["evaluate", "--data", str(food / "records.jsonl")], "no model: give --model DIR")
    fails(capsys, ["evaluate", config, "--predictions", "p.jsonl"], "leave out config")
    fails(capsys, ["evaluate", "--predictions", "/nowhere/p.jsonl"], "no such predictions file")
    fails(capsys, ["generate", "--image", "gone.png", "--task", "recipe"], "gone.png: no such picture")
    fails(capsys, ["generate", "--image", image, "--task", "recipe"], "no model: give --model DIR")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(
        '{"id": "a", "image": "a.png", "source": "s", "ingredients": [{"name": "x", "amount": "two"}]}\n'
    )
    fails(
        capsys,
        ["train", config, f"data.sources.0.path={bad}"],
        "bad.jsonl:1: ingredients[0].amount: expected a number",
    )
    fails(
        capsys,
        ["data", "convert", "food-photos", "/nowhere", str(tmp_path / "o.jsonl")],
        "/nowhere is not a folder",
    )
    with pytest.raises(FileNotFoundError):
        main(["train", "none.yaml", "--debug"])


def test_evaluation_with_a_vocabulary(capsys, config, tmp_path):
    file, out = tmp_path / "vocabulary.json", tmp_path / "out"
    vocabulary = Vocabulary({"rice": {"rice": 1}})
    vocabulary.save(file)
    argv = ["evaluate", config, "--untrained", "--tasks", "ingredients", "--out", str(out), "--quiet"]
    fails(capsys, [*argv, "evaluation.vocabulary=none.json"], "none.json: no such vocabulary")
    assert main([*argv, f"evaluation.vocabulary={file}"]) == 0
    assert f"ingredient_vocabulary: {vocabulary.name}" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["all"]["ingredient_coverage"] == 50  # rice of rice and leaf
    other = Vocabulary({"rice": {"rice": 1}, "leaf": {"leaf": 1}})
    other.save(file)
    assert main(["evaluate", "--predictions", str(out / "predictions.jsonl"), "--vocabulary", str(file)]) == 0
    assert f"ingredient_vocabulary: {other.name}" in capsys.readouterr().out
    assert json.loads((out / "metrics.json").read_text())["all"]["ingredient_coverage"] == 100


def test_from_records_to_an_answer(capsys, config, tmp_path, food):
    run = tmp_path / "run"
    assert main(["train", config, "--quiet", "training.logging_steps=1"]) == 0
    assert f"adapter in {run}: 2 steps on 48 examples" in capsys.readouterr().out
    fails(capsys, ["train", config], "holds checkpoint-2: pass --resume, or set another output_dir")
    assert main(["train", config, "--resume", "training.max_steps=3", "--quiet"]) == 0
    assert "3 steps" in capsys.readouterr().out

    assert main(["evaluate", config, "--quiet"]) == 0
    table = capsys.readouterr().out
    assert table.split()[:3] == ["all", "left", "right"] or table.split()[:3] == ["all", "right", "left"]
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert metrics["all"]["n_nutrition"] == 4
    assert main(["evaluate", "--predictions", str(run / "evaluation" / "predictions.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines() == table.splitlines()[:-1]

    assert main(["evaluate", config, "--untrained", "--tasks", "category", "--limit", "2", "--quiet"]) == 0
    rows = (run / "untrained" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["task"] for row in rows] == ["category"] * 2
    out = tmp_path / "elsewhere"
    argv = [
        "evaluate",
        "--adapter",
        str(run / "checkpoint-3"),
        "--data",
        str(food / "records.jsonl"),
        "--split",
        "train",
    ]
    assert main([*argv, "--tasks", "nutrition", "--max-new-tokens", "2", "--out", str(out), "--quiet"]) == 0
    assert json.loads((out / "metrics.json").read_text())["all"]["n_nutrition"] == 12
    capsys.readouterr()

    images = [str(food / "1.png"), str(food / "2.png")]
    argv = [
        "generate",
        "--adapter",
        str(run),
        "--task",
        "nutrition",
        "--max-new-tokens",
        "4",
        "--json",
        "--quiet",
    ]
    assert main([*argv, "--image", *images]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == images
    assert set(rows[0]) == {"image", "question", "answer", "task", "parsed"}


def test_stage_1_then_its_projector(capsys, config, tmp_path, food, llava_dir):
    values = yaml.safe_load(Path(config).read_text())
    del values["adapter"]
    stage1 = tmp_path / "stage1.yaml"
    stage1.write_text(
        yaml.safe_dump({**values, "stage": "projector", "output_dir": str(tmp_path / "stage1")})
    )
    assert main(["train", str(stage1), "--quiet"]) == 0
    assert (tmp_path / "stage1" / "projector.safetensors").is_file()
    assert main(["evaluate", str(stage1), "--limit", "2", "--quiet"]) == 0
    assert main(["train", config, f"model.projector={tmp_path / 'stage1'}", "--quiet"]) == 0
    projector = str(tmp_path / "stage1")
    argv = [
        "generate",
        "--model",
        str(llava_dir),
        "--projector",
        projector,
        "--device",
        "cpu",
        "--prompt",
        "vicuna",
    ]
    assert (
        main([*argv, "--image", str(food / "1.png"), "--question", "Is it hot?", "--max-new-tokens", "2"])
        == 0
    )


def test_what_was_taught_is_said(capsys, taught):
    result, examples = taught
    argv = [
        "generate",
        "--adapter",
        str(result.output_dir),
        "--image",
        examples[1].image,
        "--question",
        "What is it?",
    ]
    assert main(argv) == 0
    assert capsys.readouterr().out == examples[1].answer + "\n"


def test_bad_pictures_in_evaluation(capsys, config, tmp_path, food, llava_dir):
    lines = (food / "records.jsonl").read_text().splitlines()
    records = tmp_path / "records.jsonl"
    broken = {**json.loads(lines[12]), "image": "gone.png"}
    whole = {**json.loads(lines[13]), "image": str(food / "13.png")}
    records.write_text(f"{json.dumps(broken)}\n{json.dumps(whole)}\n")
    argv = ["evaluate", "--model", str(llava_dir), "--data", str(records), "--tasks", "category", "--quiet"]
    argv += ["--max-new-tokens", "2", "--out", str(tmp_path / "out"), "--prompt", "vicuna"]
    fails(capsys, argv, f"record dish12: {tmp_path / 'gone.png'}: no such picture")
    assert main([*argv, "--on-bad-image", "skip"]) == 0
    said = capsys.readouterr()
    assert "left out: record dish12" in said.err
    assert "records left out: 1" in said.out


def test_interrupted_is_130(capsys, config, tmp_path):
    def interrupt():
        for _ in range(6000):  # a minute, then the assertions below say what happened
            if latest_checkpoint(tmp_path / "run") is not None:
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert main(["train", config, "training.max_steps=500", "training.save_steps=2", "--quiet"]) == 130
    thread.join()
    assert "go on with --resume" in capsys.readouterr().err


def test_interrupted_before_training_is_130(capsys, monkeypatch, config):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("rode.training.train.load_vlm", stop)
    assert main(["train", config]) == 130
    assert capsys.readouterr().err.strip().endswith("rode: interrupted")


def test_an_edited_adapter_is_named_and_with_strict_refused(capsys, taught, tmp_path):
    result, examples = taught
    adapter = tmp_path / "run"
    shutil.copytree(result.output_dir, adapter)
    argv = ["generate", "--adapter", str(adapter), "--image", examples[1].image, "--question", "What is it?"]
    assert main([*argv, "--strict"]) == 0
    file = adapter / "adapter_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"alpha": values["alpha"] * 2}))
    with pytest.warns(AdapterMismatch, match="was edited"):
        assert main(argv) == 0
    fails(
        capsys,
        [*argv, "--strict"],
        "adapter_config.json: the configuration was edited after the adapter was saved",
    )


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"rode {metadata.version('rode')}\n"


def test_a_shell_s_completion(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "bash"])
    assert ended.value.code == 1
    assert "pip install shtab" in capsys.readouterr().err
    monkeypatch.setitem(
        sys.modules, "shtab", SimpleNamespace(complete=lambda parser, shell: f"{parser.prog} in {shell}")
    )
    with pytest.raises(SystemExit) as ended:
        main(["--print-completion", "zsh"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "rode in zsh\n"


@pytest.mark.parametrize("quiet", [True, False])
def test_quiet_is_quiet_and_a_log_file_has_plain_lines(config, tmp_path, quiet):
    """As a command: libraries read their settings when they are imported."""
    argv = [
        sys.executable,
        "-m",
        "rode",
        "train",
        config,
        "training.logging_steps=1",
        *(["--quiet"] if quiet else []),
    ]
    run = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    said = run.stdout + run.stderr
    assert "\r" not in said
    assert "\x1b" not in said
    assert ("'loss'" in said) is not quiet
    result = f"adapter in {tmp_path / 'run'}: 2 steps on "
    assert result in run.stdout
    if quiet:
        lines = [line for line in said.splitlines() if "[WARNING]" not in line]  # of a library's own logger
        assert len(lines) == 1
