"""Runs: what is started with which command, what is gone on with, what is refused, and what a failure or Ctrl-C leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from made_up_dishes import dishes
from rode.paper.results import _losses, adapter_differences, differences, file_hash, read_result
from rode.paper.runs import call
from rode.training.config import experiment_values, load_experiment
from rode_food import read_records
from rode_food.shards.address import ShardError
from rode_food.shards.write import write_shards

CONFIGS = Path(__file__).parents[3] / "configs" / "paper"


def result(tmp_path, variant, seed=0):
    return json.loads((tmp_path / "results" / "small" / variant / f"seed-{seed}.json").read_text())


def fails(capsys, code, message):
    assert code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("rode: ")
    assert message in said


def test_each_variant_and_seed_is_trained_and_evaluated_once(capsys, processes, reproduce, tmp_path):
    argv = ["table5", "--only", "relu-8888", "softmax-8888", "--seeds", "0", "1"]
    assert reproduce(*argv, "training.logging_steps=3") == 0  # an override after a list, too
    runs = ["relu-8888-seed0", "softmax-8888-seed0", "relu-8888-seed1", "softmax-8888-seed1"]
    assert processes.steps() == [(step, run, False) for run in runs for step in ("train", "evaluate")]
    assert "== relu-8888 seed 1 (3 of 4): new" in capsys.readouterr().out

    experiment = load_experiment(tmp_path / "runs" / "small" / "relu-8888-seed1" / "config.yaml")
    assert (experiment.name, experiment.training.seed, experiment.training.logging_steps) == (
        "relu-8888",
        1,
        3,
    )
    assert (experiment.model.path, experiment.training.max_steps) == ("models/small", 6)
    assert experiment.adapter["ranks"] == [8, 8, 8, 8]

    # table 6 wants a run that table 5 made
    assert reproduce("table6", "--only", "relu-8888", "training.logging_steps=3") == 0
    assert processes.calls == []
    assert "== relu-8888 seed 0 (1 of 1): finished" in capsys.readouterr().out


def test_what_a_result_holds(processes, reproduce, tmp_path):
    assert reproduce("table4", "--only", "lora-8", "top1-8888", "--seeds", "2") == 0
    found = result(tmp_path, "top1-8888", 2)
    assert (found["variant"], found["seed"], found["base"]) == ("top1-8888", 2, "small")
    assert found["metrics"] == {"sacrebleu": 2.0, "n_recipe": 4}
    assert (found["trainable_parameters"], found["steps"], found["examples"]) == (32000, 6, 12)
    assert found["machine"] == "1 x cpu, 2 CPU cores (x86_64)"
    assert found["loss"] == [[1, 3.0], [2, 1.5], [3, 1.0], [4, 0.75], [5, 0.6], [6, 0.5]]
    folder = tmp_path / "runs" / "small" / "top1-8888-seed2"
    assert [entry["command"] for entry in found["commands"]] == [
        f"python -m rode {step} {folder / 'config.yaml'} --quiet" for step in ("train", "evaluate")
    ]
    assert [entry["exit_code"] for entry in found["commands"]] == [0, 0]
    assert found["gates"]["all"] == {
        "blocks": [0, 1],
        "mean_gate": [[2.0, 2.25, 2.5, 2.75]] * 2,
        "open_rate": [[2.0, 2.25, 2.5, 2.75]] * 2,
    }
    assert found["gates"]["image"]["blocks"] == []
    assert result(tmp_path, "lora-8", 2)["gates"] is None
    assert found["adapter"]["ranks"] == [8, 8, 8, 8]
    assert found["config"]["training"]["seed"] == 2
    # sha256 of "{}\n"
    assert found["data"] == {
        str(tmp_path / "records.jsonl"): "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    }
    assert found["versions"]["torch"]


def test_what_was_stopped_goes_on(capsys, processes, reproduce, tmp_path):
    argv = ["table4", "--only", "lora-8", "lora-32"]
    processes.stopped = {("train", "lora-8"), ("evaluate", "lora-8")}
    assert reproduce(*argv) == 130
    assert "lora-8 seed 0 is stopped; the same command goes on from here" in capsys.readouterr().err
    assert processes.steps() == [("train", "lora-8-seed0", False)]  # and no other run was begun
    assert reproduce(*argv) == 130
    assert "lora-8 seed 0 (1 of 2): begun" in capsys.readouterr().out
    assert processes.steps() == [("train", "lora-8-seed0", True), ("evaluate", "lora-8-seed0", False)]
    assert reproduce(*argv) == 0
    assert processes.steps() == [
        ("evaluate", "lora-8-seed0", False),
        ("train", "lora-32-seed0", False),
        ("evaluate", "lora-32-seed0", False),
    ]
    codes = [entry["exit_code"] for entry in result(tmp_path, "lora-8")["commands"]]
    assert codes == [None, 0, None, 0]  # all four processes, the stopped ones too


def test_a_failed_run_loses_no_other(capsys, processes, reproduce, tmp_path):
    processes.failing = {("train", "lora-8"), ("evaluate", "lora-32")}
    argv = ["table4", "--only", "lora-8", "lora-32", "top1-8888"]
    assert reproduce(*argv) == 1
    said = capsys.readouterr()
    assert "rode: lora-8 seed 0: training ended with exit code 1" in said.err
    assert "rode: lora-32 seed 0: evaluation ended with exit code 1" in said.err
    assert "8,8,8,8 top-1" in said.out
    assert result(tmp_path, "top1-8888")["metrics"]["sacrebleu"] == 0.0
    assert not (tmp_path / "results" / "small" / "lora-8").exists()
    processes.failing = set()
    processes.calls.clear()
    assert reproduce(*argv) == 0
    assert [step for step, _, _ in processes.steps()] == ["train", "evaluate", "evaluate"]


def test_the_launcher_starts_training_alone(processes, reproduce, tmp_path):
    launcher = f'"{sys.executable}" -m accelerate.commands.launch --num_processes 2'
    assert reproduce("table4", "--only", "lora-8", "--launcher", launcher) == 0
    experiment = str(tmp_path / "runs" / "small" / "lora-8-seed0" / "config.yaml")
    words = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    assert processes.calls == [
        [*words, "-m", "rode", "train", experiment, "--quiet"],
        [sys.executable, "-m", "rode", "evaluate", experiment, "--quiet"],
    ]


def test_another_config_is_refused(capsys, processes, reproduce, tmp_path):
    argv = ["table4", "--only", "lora-8"]
    assert reproduce(*argv) == 0
    fails(capsys, reproduce(*argv, "training.max_steps=7"), "training.max_steps: 7 (was 6)")
    fails(
        capsys,
        reproduce(*argv, "adapter.alpha=32"),
        "adapter.alpha: 32.0 (was 16.0); give its settings again",
    )
    # before the evaluation there is no result yet, and the folder says it
    (tmp_path / "results" / "small" / "lora-8" / "seed-0.json").unlink()
    fails(
        capsys, reproduce(*argv, "training.max_steps=7"), "training.max_steps: 7 (was 6); give its settings"
    )
    assert reproduce(*argv) == 0
    # a default that is written out changes nothing, neither for a result nor for a folder
    assert reproduce(*argv, "adapter.alpha=16") == 0
    assert processes.steps()[2:] == [("evaluate", "lora-8-seed0", False)]

    records = tmp_path / "records.jsonl"
    moved = tmp_path / "moved.jsonl"
    moved.write_text(records.read_text())
    assert reproduce(*argv, f"data.sources.0.path={moved}") == 0  # what it holds is the same
    moved.write_text("{}\n{}\n")
    fails(capsys, reproduce(*argv, f"data.sources.0.path={moved}"), "data.sources: ")


def test_a_vocabulary_counts_by_what_it_holds(capsys, processes, reproduce, tmp_path):
    argv = ["table4", "--only", "lora-8"]
    one, moved = tmp_path / "vocabulary.json", tmp_path / "moved.json"
    fails(capsys, reproduce(*argv, f"evaluation.vocabulary={one}"), "vocabulary.json: no such vocabulary;")
    one.write_text("{}\n")
    moved.write_text("{}\n")
    assert reproduce(*argv, f"evaluation.vocabulary={one}") == 0
    assert result(tmp_path, "lora-8", 0)["data"][str(one)].startswith("ca3d163b")
    assert reproduce(*argv, f"evaluation.vocabulary={moved}") == 0
    fails(capsys, reproduce(*argv), "evaluation.vocabulary: null (was ")
    moved.write_text("{}\n\n")
    fails(capsys, reproduce(*argv, f"evaluation.vocabulary={moved}"), "evaluation.vocabulary: ")


def test_shards_count_by_what_they_hold(tmp_path):
    records = list(read_records(dishes(tmp_path / "in", 4)))
    for name in ("a", "b"):
        write_shards(records, tmp_path / name)
    write_shards(records[:3], tmp_path / "c")
    assert file_hash(str(tmp_path / "a")) == file_hash(str(tmp_path / "b")) != file_hash(str(tmp_path / "c"))
    with pytest.raises(ShardError, match=r"no folder of shards: index.json is missing"):
        file_hash(str(tmp_path))


def test_older_results_are_compared_key_by_key(processes, reproduce, tmp_path):
    argv = ["table4", "--only", "lora-8"]
    assert reproduce(*argv) == 0
    file = tmp_path / "results" / "small" / "lora-8" / "seed-0.json"
    found = json.loads(file.read_text())
    del found["config"]["training"]["questions_per_picture"]
    found["recipe"] = found.pop("config")  # the key's name in older results
    file.write_text(json.dumps(found))
    assert reproduce(*argv) == 0


def test_wrong_arguments(capsys, processes, reproduce, tmp_path):
    fails(capsys, reproduce("table9"), "table or figure 'table9': no such one")
    fails(
        capsys,
        reproduce("table4", "--only", "lora-9"),
        "'lora-9' is no variant of table4; did you mean lora-8",
    )
    fails(
        capsys,
        reproduce("table4", "--seeds", "one"),
        "--seeds: expected whole numbers of at least 0, got 'one'",
    )
    fails(
        capsys,
        reproduce("table4", "training.seed=3"),
        "training.seed is set here for each run: see --only, --seeds",
    )
    fails(capsys, reproduce("table4", "--launcher", "no-such-launcher -n 2"), "got 'no-such-launcher'")
    fails(
        capsys, reproduce("table4", "data.sources.0.path=/gone.jsonl"), "/gone.jsonl: no such file of records"
    )
    fails(capsys, reproduce("table4", "training.max_stepz=3"), "did you mean max_steps")
    file = tmp_path / "results" / "small" / "lora-8" / "seed-0.json"
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    fails(capsys, reproduce("table4"), "seed-0.json: not a result of `rode reproduce`; move it away")
    assert processes.calls == []


def test_differences():
    now, then = {"a": {"x": 1, "y": [1]}, "n": 1}, {"a": {"x": 2, "z": None}, "n": 2}
    assert differences(now, then, {"n"}) == [
        "a.x: 1 (was 2)",
        "a.y: [1] (was nothing)",
        "a.z: nothing (was null)",
    ]


def test_losses_are_thinned_and_keep_the_last():
    history = [{"step": i, "loss": float(i)} for i in range(1, 1001)]
    assert _losses(history) == [[i, float(i)] for i in range(5, 1001, 5)]
    assert _losses([{"step": 1, "loss": float("nan")}, {"step": 1, "train_runtime": 3}]) == [[1, None]]


CHILD = """
import signal, sys, time
def stop(*_):
    sys.exit(5)
signal.signal(signal.SIGINT, stop)
print("ready", flush=True)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_reaches_the_command_and_its_end_is_waited_for(monkeypatch, tmp_path):
    assert call([sys.executable, "-c", "raise SystemExit(3)"]) == 3
    with pytest.raises(KeyboardInterrupt):  # it was interrupted itself
        call([sys.executable, "-c", "raise SystemExit(130)"])

    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    def remember(*args, **kwargs):
        started.append(popen(*args, **kwargs))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", remember)
    ready, over = tmp_path / "ready", threading.Event()
    before = signal.getsignal(signal.SIGINT)

    def interrupt():
        while not ready.exists() and not over.wait(0.01):
            pass
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            call([sys.executable, "-c", CHILD, str(ready)])
    finally:
        over.set()
        thread.join()
    assert started[0].returncode == 5  # its own handler ran
    assert signal.getsignal(signal.SIGINT) is before


def test_kept_results_are_of_the_variants_as_they_are_today():
    """Their configs write out defaults that the files of today leave out."""
    files = sorted((CONFIGS.parents[1] / "results" / "plates").glob("*/seed-*.json"))
    assert len(files) == 27
    for file in files:
        then = read_result(file)["config"]
        now = {**then, "adapter": experiment_values(CONFIGS / f"{then['name']}.yaml")["adapter"]}
        assert now["adapter"] != then["adapter"]
        assert adapter_differences(now, then) == []
        now["adapter"] = {**now["adapter"], "dropout": 0.1}
        assert adapter_differences(now, then) == ["adapter.dropout: 0.1 (was 0.05)"]
