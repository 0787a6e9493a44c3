"""A loss or a gradient that is not finite stops training before the optimizer, and costs nothing that was there."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from rode.cli import main
from rode.training import train as train_module
from rode.training import trainer
from rode.training.config import dump_experiment
from rode.training.finite import NotFiniteError, StepGuard
from rode.training.train import train
from rode.vlm import load_adapter, load_vlm
from rode_food.data_mixture import DataMixture

REAL_LOSS = trainer.answer_loss
STEP = 4


def spoil(kind, loss, model):
    """Not a number, infinite with a gradient that is finite, or finite with a gradient that is not."""
    if kind == "nan":
        return loss * math.nan
    if kind == "inf":
        return loss + math.inf
    weight = next(p for p in model.parameters() if p.requires_grad)
    return loss + (weight.sum() * 0).sqrt()  # its derivative at 0 is infinite, times 0


def spoiled_at(call, kind):
    """`answer_loss`, spoiled at its call number `call` (from 0)."""
    calls = iter(range(10**6))

    def loss(model, *args):
        value = REAL_LOSS(model, *args)
        return spoil(kind, value, model) if next(calls) == call else value

    return loss


def spoil_layer(model, monkeypatch, at):
    """Let a layer give NaN from its call number `at` on; its name."""
    name, layer = next(
        (n, m) for n, m in model.named_modules() if n.endswith("language_model.layers.1.self_attn.v_proj")
    )
    real, calls = layer.forward, iter(range(10**6))

    def forward(*args, **kwargs):
        out = real(*args, **kwargs)
        return out * math.nan if next(calls) >= at else out

    monkeypatch.setattr(layer, "forward", forward)
    return name


@pytest.fixture
def nan_layer(monkeypatch):
    """A function that makes training put `spoil_layer` into the adapted model; gives a list that gets the layer's name."""
    real = train_module.make_trainable

    def spoiled(at):
        found = []

        def make(*args):
            model = real(*args)
            found.append(spoil_layer(model, monkeypatch, at))
            return model

        monkeypatch.setattr(train_module, "make_trainable", make)
        return found

    return spoiled


@pytest.mark.parametrize("counted", [True, False])
def test_the_layer_is_named_with_its_gates(make_experiment, examples, nan_layer, counted):
    found = nan_layer(1)
    experiment = make_experiment(training={"max_steps": 3, "gate_statistics": counted})
    with pytest.raises(NotFiniteError) as caught:
        train(experiment, examples=examples, progress=False)
    text = str(caught.value)
    assert text.startswith("step 2: the loss is nan on the records dish")
    assert f"the first layer with a value that is not finite is {found[0]}" in text
    assert (
        bool(re.search(r"\(its gates: rank 2: open for \d+% of tokens, mean [\d.]+; rank 4: ", text))
        == counted
    )


def test_the_gradient_is_named(make_experiment, examples, monkeypatch):
    def loss(model, *args):
        weight = [p for p in model.parameters() if p.requires_grad][3]
        return REAL_LOSS(model, *args) + (weight.sum() * 0).sqrt()

    monkeypatch.setattr(trainer, "answer_loss", loss)
    with pytest.raises(NotFiniteError) as caught:
        train(make_experiment(training={"max_steps": 3}), examples=examples, progress=False)
    assert "the gradient norm is nan" in str(caught.value)
    assert re.search(
        r"the first gradient that is not finite, from the loss backwards, is that of \S+rode_",
        str(caught.value),
    )


def test_steps_are_left_out(make_experiment, examples, tmp_path, monkeypatch, caplog):
    """Weights, and the optimizer's memory, are as if such a step had not been."""
    experiment = make_experiment(
        training={
            "max_steps": 4,
            "save_steps": 1,
            "save_total_limit": 10,
            "on_nonfinite": "skip",
            "weight_decay": 0.1,
        }
    )
    monkeypatch.setattr(trainer, "answer_loss", spoiled_at(1, "nan"))
    result = train(experiment, examples=examples, progress=False)
    assert result.metrics["nonfinite_steps"] == 1
    assert result.metrics["steps"] == 4
    one, two, three = (
        load_file(experiment.run_dir / f"checkpoint-{step}" / "adapter_model.safetensors")
        for step in (1, 2, 3)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not all(torch.equal(three[name], two[name]) for name in one)
    states = [
        torch.load(experiment.run_dir / f"checkpoint-{step}" / "optimizer.pt")["state"][0] for step in (1, 2)
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    entries = [entry for entry in result.history if "loss" in entry]
    assert all(math.isfinite(value) for entry in entries for value in entry.values())
    assert [entry.get("nonfinite_steps") for entry in entries] == [None, 1, 1, 1]
    assert "step 2: the loss is nan on the records dish" in caplog.text
    assert "this step is left out (1 in a row, 1 in all)" in caplog.text


def test_too_many_in_a_row_stop(make_experiment, examples, nan_layer):
    found = nan_layer(1)
    experiment = make_experiment(training={"max_steps": 9, "on_nonfinite": "skip", "max_nonfinite": 2})
    with pytest.raises(
        NotFiniteError, match=r"step 4: .* 2 steps in a row have been left out before it"
    ) as caught:
        train(experiment, examples=examples, progress=False)
    assert found[0] in str(caught.value)


def test_weights_that_are_not_finite_are_not_saved(make_experiment, examples, monkeypatch):
    """The gradient of the last step is finite, and what the optimizer makes of it is not."""
    real = torch.optim.AdamW.step

    def step(self, *args):
        real(self, *args)
        with torch.no_grad():
            self.param_groups[0]["params"][2].view(-1)[0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    experiment = make_experiment(training={"max_steps": 1})
    with pytest.raises(
        NotFiniteError, match=r"the weight \S+ had values that are not finite when they were to be"
    ):
        train(experiment, examples=examples, progress=False)
    assert not list(experiment.run_dir.glob("checkpoint-*"))
    assert not (experiment.run_dir / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize(
    "adapter",
    [{"ranks": [2, 4]}, {"method": "peft", "peft_type": "LORA", "r": 4}, {"method": "moe-llava"}],
)
def test_an_adapter_that_is_not_finite_is_refused(make_experiment, examples, value, adapter):
    experiment = make_experiment(training={"max_steps": 1})
    experiment.adapter = adapter
    result = train(experiment, examples=examples, progress=False)
    file = next(result.output_dir.glob("*.safetensors"))
    weights = load_file(file)
    name = sorted(weights)[-1]
    weights[name].flatten()[0] = value
    save_file(weights, file, {"format": "pt"})
    model, _ = load_vlm(experiment.model.path, dtype="float32", device="cpu")
    with pytest.raises(ValueError, match=f"{file}: {re.escape(name)} holds values that are not finite"):
        load_adapter(model, result.output_dir)


@pytest.mark.parametrize(("accumulation", "most"), [(1, 0.0), (2, 1.0)], ids=["not clipped", "clipped"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [("nan", "the loss is nan"), ("inf", "the loss is inf"), ("gradient", "the gradient norm is nan")],
)
def test_training_stops_before_the_step(
    make_experiment, examples, llava_dir, monkeypatch, kind, words, accumulation, most
):
    size = 4 // accumulation
    experiment = make_experiment(
        training={
            "max_steps": 6,
            "save_steps": 1,
            "save_total_limit": 2,
            "batch_size": size,
            "gradient_accumulation": accumulation,
            "max_grad_norm": most,
            "gate_statistics": False,
        }
    )
    # the last micro-batch of step 4, which is the first step of the second epoch
    monkeypatch.setattr(trainer, "answer_loss", spoiled_at(STEP * accumulation - 1, kind))
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    with pytest.raises(NotFiniteError) as caught:
        train(experiment, examples=examples, model=model, processor=processor, progress=False)
    order = DataMixture(examples, [12], [1.0], experiment.training.seed).plan(1)[:4]
    named = order if kind == "gradient" else order[4 - size :]
    ids = ", ".join(examples[i].record_id for i in named)
    folder = experiment.run_dir
    assert str(caught.value).startswith(f"step 4: {words} on the records {ids}; training has stopped")
    assert f"the last good checkpoint is {folder / 'checkpoint-3'}:" in str(caught.value)
    assert {p.name for p in folder.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert not (folder / "adapter_model.safetensors").exists()
    assert not (folder / "training.json").exists()
    history = json.loads((folder / "history.json").read_text())
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert all(math.isfinite(entry[name]) for entry in history for name in ("loss", "grad_norm"))
    saved = load_file(folder / "checkpoint-3" / "adapter_model.safetensors")
    held = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in saved} == held.keys()
    for name, weight in held.items():
        assert torch.equal(weight, saved[f"base_model.model.{name}"]), name


def test_the_run_goes_on_where_it_was(make_experiment, examples, tmp_path, monkeypatch):
    training = {"max_steps": 3, "save_steps": 1, "gate_statistics": False}
    whole = train(make_experiment(training=training), examples=examples, progress=False)
    experiment = make_experiment(training=training, output_dir=str(tmp_path / "stopped"))
    monkeypatch.setattr(trainer, "answer_loss", spoiled_at(1, "nan"))
    with pytest.raises(NotFiniteError, match="step 2: "):
        train(experiment, examples=examples, progress=False)
    monkeypatch.setattr(trainer, "answer_loss", REAL_LOSS)
    rest = train(experiment, examples=examples, resume=True, progress=False)
    want, got = (load_file(r.output_dir / "adapter_model.safetensors") for r in (whole, rest))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_command_says_so_in_one_line(make_experiment, tmp_path, food, monkeypatch, capsys):
    experiment = make_experiment(training={"max_steps": 2})
    file = tmp_path / "config.yaml"
    file.write_text(dump_experiment(experiment))
    monkeypatch.setattr(trainer, "answer_loss", spoiled_at(0, "nan"))
    assert main(["train", str(file), "--quiet"]) == 3
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rode: ")]
    assert len(lines) == 1
    assert lines[0].startswith("rode: step 1: the loss is nan on the records dish")
    assert "and there is no checkpoint yet:" in lines[0]
    assert json.loads((experiment.run_dir / "history.json").read_text()) == []


class CountWaits(TorchDispatchMode):
    """Counts how often a value is brought from the device to Python."""

    waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.waits += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_good_step_waits_for_the_device_once(tmp_path):
    guard = StepGuard(str(tmp_path))
    with CountWaits() as counted:
        for _ in range(3):
            for loss in (1.0, 2.0):
                guard.add(torch.tensor(loss), ["a"])
            guard.check(torch.tensor(5.0), 1)
    assert counted.waits == 3
    guard.add(torch.tensor(1.0), ["a", "b", "a"])
    with pytest.raises(NotFiniteError, match="step 7: the gradient norm is inf on the records a, b;"):
        guard.check(torch.tensor(math.inf), 7)
    guard.add(torch.tensor(1.0), ["c"])  # nothing of the step before is left
    guard.check(torch.tensor(1.0), 8)


RANK_ONE = """
import os, sys
sys.path.insert(0, {tests!r})
from rode.training import train as train_module
from rode.training import trainer
from rode.cli import main
from test_finite import spoiled_at
if os.environ["RANK"] == "1":
    trainer.answer_loss = spoiled_at(2, "inf")
sys.exit(main(["train", {config!r}, "--quiet"]))
"""


@pytest.mark.slow
def test_all_processes_stop_for_the_loss_of_one(make_experiment, tmp_path):
    """An infinite loss whose gradient is finite is known to its own process alone."""
    training = {"max_steps": 5, "save_steps": 1, "save_total_limit": 1, "devices": 2, "batch_size": 2}
    experiment = make_experiment(training=training)
    (tmp_path / "config.yaml").write_text(dump_experiment(experiment))
    script = tmp_path / "script.py"
    here = os.path.dirname(__file__)
    script.write_text(RANK_ONE.format(tests=here, config=str(tmp_path / "config.yaml")))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("rode: ")]
    assert len(lines) == 1
    assert lines[0].startswith("rode: step 3: the loss is inf on the records dish")
    assert len(lines[0].split(" on the records ")[1].split(";")[0].split(", ")) <= 2  # those of one process
    assert {p.name for p in experiment.run_dir.glob("checkpoint-*")} == {"checkpoint-2"}
    history = json.loads((experiment.run_dir / "history.json").read_text())
    assert [entry["step"] for entry in history] == [1, 2]
