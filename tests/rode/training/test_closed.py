"""Gates that stay closed and gradients that stay zero are said once, and are in the log."""

from __future__ import annotations

import pytest
import torch

from rode.training import train as train_module
from rode.training.closed import ClosedGates, ZeroGradients
from rode.training.train import train
from rode.tuner.statistics import GateReport, LayerGates


def report(*rates):
    """A layer for each of the tuples of rates."""
    return GateReport(
        tuple(
            LayerGates(f"layers.{i}.q", i, "default", (2, 4), {"all": 5}, {"all": rate}, {"all": rate})
            for i, rate in enumerate(rates)
        )
    )


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "rode.training.closed"]


def test_a_closed_layer_is_said_once(caplog):
    gates = ClosedGates(100)
    counts = gates.update(report((0.0, 0.0), (0.5, 0.0)), 10)
    assert counts == {"gates/closed_layers": 1, "gates/dead_experts": 1, "gates/dead_experts_of_layers": 3}
    gates.update(report((0.0, 0.0), (0.5, 0.1)), 60)
    gates.update(report((0.0, 0.0), (0.5, 0.1)), 108)
    assert lines(caplog) == []  # 1 + 50 + 48
    gates.update(report((0.0, 0.0), (0.5, 0.1)), 109)
    assert len(lines(caplog)) == 1
    assert lines(caplog)[0].startswith("step 109: all gates of layers.0.q have been closed for 100 steps: ")
    for word in ("bias", "initialisation", "learning_rate"):
        assert word in lines(caplog)[0]
    gates.update(report((0.0, 0.0), (0.5, 0.1)), 300)
    assert len(lines(caplog)) == 1


def test_an_expert_that_is_closed_everywhere(caplog):
    gates = ClosedGates(100)
    gates.update(report((0.1, 0.0), (0.5, 0.0)), 1)
    gates.update(report((0.1, 0.2), (0.5, 0.0)), 90)  # open again: the count begins anew
    gates.update(report((0.1, 0.0), (0.5, 0.0)), 180)
    assert lines(caplog) == []
    gates.update(report((0.1, 0.0), (0.5, 0.0)), 190)
    assert len(lines(caplog)) == 1
    assert (
        "the gates of expert 1 (rank 4, adapter 'default') in all layers have been closed" in lines(caplog)[0]
    )


def test_zero_gradients_are_said_once(caplog):
    gradients = ZeroGradients(3)
    for norm in (0.0, 0.0, 1.0, 0.0, 0.0):
        gradients.add(torch.tensor(norm))
    gradients.tell(5)
    assert lines(caplog) == []
    gradients.add(0.0)
    gradients.add(torch.tensor(2.0))
    gradients.tell(7)
    gradients.tell(8)
    assert len(lines(caplog)) == 1
    assert "step 7: the gradient of all that is trained has been 0 for 3 steps" in lines(caplog)[0]


@pytest.mark.parametrize("counted", [True, False])
def test_a_run_whose_gates_are_closed(make_experiment, examples, monkeypatch, caplog, counted):
    real = train_module.make_trainable

    def closed(*args):
        model = real(*args)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("router_weight"):
                    parameter.zero_()
                    parameter.requires_grad_(False)
        return model

    monkeypatch.setattr(train_module, "make_trainable", closed)
    experiment = make_experiment(
        adapter={"router_bias": False},
        training={"max_steps": 102, "logging_steps": 17, "batch_size": 1, "gate_statistics": counted},
    )
    result = train(experiment, examples=examples, progress=False)
    told = lines(caplog)
    assert sum("have been closed for" in line for line in told) == counted
    assert sum("has been 0 for 20 steps" in line for line in told) == 1
    entry = next(entry for entry in reversed(result.history) if "loss" in entry)
    assert entry["grad_norm"] == 0
    assert entry.get("gates/dead_experts") == (2 if counted else None)
    assert entry.get("gates/closed_layers") == (4 if counted else None)
