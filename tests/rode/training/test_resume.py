"""Going on with a run: from which checkpoint, from which not, and not at all where it is done."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rode.cli import main
from rode.training.arguments import total_steps, training_arguments
from rode.training.checkpoints import starting_point
from rode.training.config import dump_experiment
from rode.training.train import train


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def four_steps(make_experiment, examples):
    """A function that makes the config of a run with a checkpoint every two steps, trained for `steps` of them."""

    def run(steps=4, **training):
        training = {"max_steps": steps, "save_steps": 2, "save_total_limit": 10, **training}
        experiment = make_experiment(training=training)
        train(experiment, examples=examples, progress=False)
        return experiment

    return run


def checkpoint_of(folder, random):
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", *random):
        (checkpoint / name).touch()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    return checkpoint


def ranks(*numbers):
    return [f"rng_state_{number}.pth" for number in numbers]


@pytest.mark.parametrize(
    ("random", "processes", "error", "words"),
    [
        (ranks(0), 2, FileNotFoundError, "rng_state_1.pth is missing, and without it"),
        (ranks(1), 2, FileNotFoundError, "rng_state_0.pth is missing, and without it"),
        ([], 2, FileNotFoundError, "rng_state_0.pth is missing, and without it"),
        (
            ["rng_state.pth"],
            2,
            ValueError,
            "rng_state_0.pth is missing, .* of one process and this run has 2",
        ),
        (ranks(0, 1), 1, ValueError, "rng_state.pth is missing, .* of 2 processes and this run has 1"),
        (ranks(0, 1, 2), 2, ValueError, "of 3 processes and this run has 2; start it with as many"),
    ],
)
def test_each_process_needs_its_random_state(tmp_path, random, processes, error, words):
    checkpoint_of(tmp_path, random)
    with pytest.raises(error, match=words):
        starting_point(tmp_path, True, processes)


def test_as_many_processes_go_on(tmp_path):
    checkpoint = checkpoint_of(tmp_path, ranks(0, 1, 2))
    assert starting_point(tmp_path, True, 3) == checkpoint


def bytes_of(folder):
    """Every file below, with its bytes and the time of its last change."""
    return {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize("length", [{"max_steps": 4}, {"max_steps": None, "epochs": 2, "batch_size": 6}])
def test_a_run_that_is_done_is_left_alone(make_experiment, tmp_path, capsys, length):
    source = {"path": make_experiment().data.sources[0].path, "tasks": ["category"]}
    experiment = make_experiment(data={"sources": [source]}, training={**length, "save_steps": 3})
    file = tmp_path / "config.yaml"
    file.write_text(dump_experiment(experiment))
    assert main(["train", str(file), "--quiet"]) == 0
    before = bytes_of(experiment.run_dir)
    capsys.readouterr()
    for _ in range(2):
        assert main(["train", str(file), "--resume", "--quiet"]) == 0
        assert "run is done after 4 steps, and nothing was changed" in capsys.readouterr().out
        assert bytes_of(experiment.run_dir) == before
    more = {"max_steps": 5} if length["max_steps"] else {"epochs": 3}
    for name, value in more.items():
        setattr(experiment.training, name, value)
    rest = train(experiment, resume=True, progress=False)
    assert rest.metrics["steps"] == (5 if length["max_steps"] else 6)


def test_a_run_that_lacks_nothing_but_its_adapter_gets_it(four_steps, examples, monkeypatch):
    """As one that was stopped at its last step leaves it: the checkpoint's weights are the result, and no step is trained."""
    experiment = four_steps(logging_steps=2)  # entries for steps 1, 2 and 3 to 4
    whole = weights(experiment.run_dir)
    history = json.loads((experiment.run_dir / "history.json").read_text())
    metrics = json.loads((experiment.run_dir / "training.json").read_text())["metrics"]
    for name in ("adapter_model.safetensors", "training.json"):
        (experiment.run_dir / name).unlink()
    monkeypatch.setattr("rode.training.train.AnswerTrainer.training_step", lambda *_, **__: 1 / 0)
    result = train(experiment, examples=examples, resume=True, progress=False)
    assert_same(weights(experiment.run_dir), whole)
    assert not result.was_done
    assert result.metrics["steps"] == 4
    assert result.metrics["train_loss"] == pytest.approx(metrics["train_loss"], rel=1e-6)
    assert result.history == [entry for entry in history if "loss" in entry]
    assert json.loads((experiment.run_dir / "training.json").read_text())["metrics"] == result.metrics


@pytest.mark.parametrize(
    ("training", "steps"),
    [
        ({"epochs": 2, "batch_size": 5}, 6),  # 3 batches
        ({"epochs": 2, "batch_size": 5, "gradient_accumulation": 2}, 4),
        ({"epochs": 1.5, "batch_size": 5, "gradient_accumulation": 2}, 3),
        ({"epochs": 0.1, "batch_size": 12}, 1),
    ],
)
def test_steps_are_counted_as_trainer_does(make_experiment, examples, training, steps):
    experiment = make_experiment(training={"max_steps": None, **training})
    assert total_steps(12, training_arguments(experiment)) == steps
    assert train(experiment, examples=examples, progress=False).metrics["steps"] == steps


def test_steps_of_several_processes():
    arguments = SimpleNamespace(
        max_steps=-1, num_train_epochs=3, train_batch_size=4, world_size=4, gradient_accumulation_steps=2
    )
    assert total_steps(100, arguments) == 3 * 4  # 25 batches, 7 of them for each process


@pytest.mark.parametrize("stop", [2, 4])
def test_sums_are_of_the_whole_run(make_experiment, examples, tmp_path, stop):
    """The mean loss and the answers that were cut, whatever was logged; stopped halfway, or at the last step."""
    training = {
        "max_steps": 4,
        "save_steps": 2,
        "save_total_limit": 10,
        "logging_steps": 3,
        "on_nonfinite": "skip",
        "max_length": 189 + 7,  # soup fits; apple pie and rice and beans do not
    }
    whole = train(make_experiment(training=training), examples=examples, progress=False)
    assert whole.metrics["truncated_answers"] > 0
    start = whole.output_dir / f"checkpoint-{stop}"
    experiment = make_experiment(training=training, output_dir=str(tmp_path / "second"))
    rest = train(experiment, examples=examples, resume=start, progress=False)
    assert rest.metrics["truncated_answers"] == whole.metrics["truncated_answers"]
    assert rest.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-6)
    assert rest.metrics["steps"] == 4
