"""Training in float16, with the loss scaled."""

from __future__ import annotations

import itertools
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rode.cli import main
from rode.training import trainer
from rode.training.config import ConfigError, dump_experiment
from rode.training.finite import NotFiniteError
from rode.training.loss_scale import LossScale
from rode.training.train import train

REAL_LOSS = trainer.answer_loss


@pytest.fixture
def trained(make_experiment, examples, tmp_path):
    """A function that trains in a folder of its own; (config, entries of the log with a loss)."""
    numbers = itertools.count()

    def run(dtype="float16", resume=None, **training):
        folder = tmp_path / f"run-{next(numbers)}"
        experiment = make_experiment(
            output_dir=str(folder), model={"dtype": dtype}, training={"max_steps": 4, **training}
        )
        if resume is not None:
            shutil.copytree(resume, folder / resume.name)
        result = train(experiment, examples=examples, progress=False, resume=resume is not None)
        return experiment, [entry for entry in result.history if "loss" in entry]

    return run


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def up(folder):
    """The matrices B, which start at 0."""
    found = [weight for name, weight in weights(folder).items() if name.endswith(".B")]
    assert found
    return found


@pytest.fixture
def begins_at(monkeypatch):
    """A function that sets the factor with which training begins."""

    def begins(scale):
        monkeypatch.setattr(
            trainer, "LossScale", lambda device: LossScale(device, init_scale=scale, growth_interval=2)
        )

    return begins


@pytest.mark.parametrize("train_base", ["none", "language_model"])
def test_it_learns_what_float32_learns(trained, train_base):
    _, half = trained(train_base=train_base)
    _, single = trained("float32", train_base=train_base)
    for a, b in zip(half, single, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=3e-2)
    assert half[-1]["loss_scale"] == 65536
    assert half[-1]["overflow_steps"] == 0
    assert "loss_scale" not in single[-1]


def test_small_gradients_need_the_factor(trained, begins_at, monkeypatch):
    """A loss divided by 2^20 has gradients below what float16 holds; scaled, they arrive."""
    monkeypatch.setattr(trainer, "answer_loss", lambda *args: REAL_LOSS(*args) * 2**-20)
    norms = {}
    for scale in (1.0, 2.0**20):
        begins_at(scale)
        _, log = trained(max_steps=1)
        norms[scale] = log[0]["grad_norm"]
    _, log = trained("float32", max_steps=1)
    assert norms[2.0**20] == pytest.approx(log[0]["grad_norm"], rel=3e-2)
    assert norms[1.0] < 0.9 * log[0]["grad_norm"]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_step_that_overflows_is_left_out(trained, begins_at, max_grad_norm):
    begins_at(2.0**40)
    experiment, log = trained(max_grad_norm=max_grad_norm, max_steps=1)
    assert log[0]["loss_scale"] == 2.0**39
    assert log[0]["overflow_steps"] == 1
    assert not any(w.any() for w in up(experiment.run_dir))
    # the factor finds its place, and what follows is learned
    begins_at(2.0**22)
    experiment, log = trained(max_grad_norm=max_grad_norm, max_steps=12)
    assert 0 < log[-1]["overflow_steps"] < 12
    assert any(w.any() for w in up(experiment.run_dir))
    assert all(w.isfinite().all() for w in weights(experiment.run_dir).values())


def test_a_loss_that_is_not_a_number_is_no_overflow(trained, monkeypatch):
    monkeypatch.setattr(trainer, "answer_loss", lambda *args: REAL_LOSS(*args) * math.nan)
    with pytest.raises(NotFiniteError, match="step 1: the loss is nan"):
        trained()


def test_a_gradient_that_is_not_finite_by_itself_stops_at_a_factor_of_1(trained, begins_at, monkeypatch):
    def loss(model, *args):
        weight = next(p for p in model.parameters() if p.requires_grad)
        return REAL_LOSS(model, *args) + (weight.sum() * 0).sqrt()

    monkeypatch.setattr(trainer, "answer_loss", loss)
    begins_at(8.0)  # 8, 4, 2 may be overflows
    with pytest.raises(NotFiniteError, match="step 4: the gradient norm is nan"):
        trained(max_steps=8)
    begins_at(2.0)
    _, log = trained(max_steps=3, on_nonfinite="skip", max_nonfinite=5)
    assert (log[-1]["overflow_steps"], log[-1]["nonfinite_steps"]) == (1, 2)
    assert log[-1]["loss_scale"] == 1, "not below"


def test_the_factor_goes_on_with_the_run(trained, begins_at):
    begins_at(2.0**22)
    whole, log = trained(max_steps=6, save_steps=3, save_total_limit=10)
    assert log[2]["overflow_steps"], "the factor has changed before the checkpoint"
    want = weights(whole.run_dir)
    begins_at(2.0**10)  # of a new run
    again, entries = trained(resume=whole.run_dir / "checkpoint-3", max_steps=6, save_steps=3)
    for name in ("loss", "loss_scale", "overflow_steps"):
        assert [entry[name] for entry in entries] == [entry[name] for entry in log]
    have = weights(again.run_dir)
    assert all(torch.equal(have[name], want[name]) for name in want)


def test_sharding_refuses_it(make_experiment):
    values = {"model": {"dtype": "float16"}, "training": {"fsdp": {"version": 2}}}
    with pytest.raises(ConfigError, match=r"model\.dtype: expected bfloat16 or float32 with training\.fsdp"):
        make_experiment(**values)


def test_by_the_command(make_experiment, tmp_path):
    experiment = make_experiment(model={"dtype": "float16"}, training={"max_steps": 1})
    config = tmp_path / "half.yaml"
    config.write_text(dump_experiment(experiment))
    assert main(["train", str(config), "--quiet"]) == 0
    assert json.loads((experiment.run_dir / "history.json").read_text())[0]["loss_scale"] == 65536
