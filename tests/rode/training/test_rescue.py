"""A step that fails leaves a checkpoint of the last whole step, from which training goes on to the bit."""

from __future__ import annotations

import dataclasses
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file

from rode.cli import main
from rode.training import trainer
from rode.training.batches import portable
from rode.training.config import dump_experiment
from rode.training.train import train
from rode_food import retry, write_records
from rode_food.records import read_records

REAL_LOSS = trainer.answer_loss


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(retry, "PAUSE", 0)


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


def fails_at(call, error):
    """`answer_loss` that fails at its call number `call` (from 0), after it has drawn random numbers."""
    calls = iter(range(10**6))

    def loss(*args):
        value = REAL_LOSS(*args)
        if next(calls) == call:
            raise error
        return value

    return loss


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_error_in_a_step(make_experiment, examples, tmp_path, monkeypatch, accumulation):
    """In the second epoch, in the last batch of a step; dropout of 0.5 makes random numbers matter."""
    changes = {
        "adapter": {"dropout": 0.5},
        "training": {
            "max_steps": 7,
            "batch_size": 2,
            "gradient_accumulation": accumulation,
            "gate_statistics": False,
        },
    }
    whole = train(make_experiment(**changes), examples=examples, progress=False)
    experiment = make_experiment(output_dir=str(tmp_path / "failed"), **changes)
    monkeypatch.setattr(trainer, "answer_loss", fails_at(5 * accumulation - 1, MemoryError("too large")))
    with pytest.raises(MemoryError, match="too large") as caught:
        train(experiment, examples=examples, progress=False)
    note = caught.value.__notes__[0]
    assert note.startswith("this was in step 5, on the records dish")
    assert note.count("dish") == 2
    assert note.endswith(f"go on with --resume ({experiment.run_dir / 'checkpoint-4'})")
    assert (experiment.run_dir / "history.json").is_file()
    monkeypatch.setattr(trainer, "answer_loss", REAL_LOSS)
    rest = train(experiment, examples=examples, progress=False, resume=True)
    assert_same(weights(rest.output_dir), weights(whole.output_dir))
    assert rest.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-6)


def test_nothing_to_save(make_experiment, examples, monkeypatch):
    """The first step; a step that is saved already; and one whose optimizer had begun to change weights."""
    experiment = make_experiment(training={"max_steps": 4, "save_steps": 2})
    monkeypatch.setattr(trainer, "answer_loss", fails_at(0, TypeError("odd")))
    with pytest.raises(TypeError) as caught:
        train(experiment, examples=examples, progress=False)
    assert caught.value.__notes__[0].endswith("start the run anew: there is no checkpoint")
    assert not list(experiment.run_dir.glob("checkpoint-*"))
    monkeypatch.setattr(trainer, "answer_loss", fails_at(2, TypeError("odd")))
    with pytest.raises(TypeError):
        train(experiment, examples=examples, progress=False)
    assert [path.name for path in experiment.run_dir.glob("checkpoint-*")] == ["checkpoint-2"]
    monkeypatch.setattr(trainer, "answer_loss", REAL_LOSS)
    real, calls = torch.optim.AdamW.step, iter(range(10))

    def step(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        if next(calls) == 1:
            raise MemoryError("in the optimizer")
        return out

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(MemoryError) as caught:
        train(experiment, examples=examples, progress=False, resume=True)
    assert [path.name for path in experiment.run_dir.glob("checkpoint-*")] == ["checkpoint-2"]
    assert "checkpoint-2" in caught.value.__notes__[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_is_gone(make_experiment, food, tmp_path, monkeypatch, capsys, workers):
    """It is there when pictures are checked, and away when its batch is made."""
    picture = tmp_path / "gone.png"
    picture.write_bytes((food / "0.png").read_bytes())
    records = list(read_records(food / "records.jsonl", split="train"))[:8]
    records[3] = dataclasses.replace(records[3], image=str(picture))
    write_records(tmp_path / "records.jsonl", records)
    experiment = make_experiment(
        data={"sources": [{"path": str(tmp_path / "records.jsonl"), "tasks": ["category"]}]},
        training={"batch_size": 1, "max_steps": 16, "workers": workers},
    )
    config = tmp_path / "config.yaml"
    config.write_text(dump_experiment(experiment))
    calls = iter(range(100))

    def loss(*args):
        if next(calls) == 7:  # every picture was read once by now; the next epoch asks for it again
            picture.unlink()
        return REAL_LOSS(*args)

    monkeypatch.setattr(trainer, "answer_loss", loss)
    assert main(["train", str(config), "--quiet"]) == 1
    told = capsys.readouterr().err
    message = told.splitlines()[-1]
    assert message.startswith(f"rode: record {records[3].id}: {picture}: no such picture; this was in step ")
    step = int(message.partition("in step ")[2].partition(",")[0])
    assert f"on the records {records[3].id}; go on with --resume" in message
    left = experiment.run_dir / f"checkpoint-{step - 1}"
    assert str(left) in message
    picture.write_bytes((food / "0.png").read_bytes())
    monkeypatch.setattr(trainer, "answer_loss", REAL_LOSS)
    assert main(["train", str(config), "--quiet", "--resume"]) == 0
    whole = train(dataclasses.replace(experiment, output_dir=str(tmp_path / "whole")), progress=False)
    assert_same(weights(experiment.run_dir), weights(whole.output_dir))


@pytest.mark.parametrize("workers", [0, 1])
def test_one_failed_read_is_tried_again(make_experiment, examples, monkeypatch, tmp_path, workers):
    from rode.vlm import features

    real, marks = features.open_image, tmp_path / "marks"
    marks.mkdir()

    def failing_once(path):
        mark = marks / os.path.basename(path)
        if not mark.exists():
            mark.touch()
            raise OSError("Input/output error")
        return real(path)

    whole = train(make_experiment(training={"max_steps": 3}), examples=examples, progress=False)
    monkeypatch.setattr(features, "open_image", failing_once)
    experiment = make_experiment(
        training={"max_steps": 3, "workers": workers}, output_dir=str(tmp_path / "again")
    )
    result = train(experiment, examples=examples, progress=False)
    assert len(list(marks.iterdir())) >= 12
    assert_same(weights(result.output_dir), weights(whole.output_dir))


def test_errors_that_cannot_travel():
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one} {two}")

    there = pickle.loads(pickle.dumps(portable(Odd("a", "b"))))
    assert isinstance(there, RuntimeError)
    assert str(there) == "Odd: a b"
    assert type(portable(OSError("x"))) is OSError
