"""Signals and a time limit end training with a checkpoint; `--resume auto` begins or goes on."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from rode.cli import main
from rode.training import stopping, trainer
from rode.training.config import ConfigError, dump_experiment
from rode.training.train import train

REAL_LOSS = trainer.answer_loss


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


@pytest.fixture(autouse=True)
def not_under_nohup():
    """The tests' own process may have been started so that it ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def signal_at(monkeypatch):
    """A function that lets the step with this number (from 1) get a signal."""

    def at(step, number):
        calls = iter(range(1, 10**6))

        def loss(*args):
            if next(calls) == step:
                os.kill(os.getpid(), number)
            return REAL_LOSS(*args)

        monkeypatch.setattr(trainer, "answer_loss", loss)

    return at


@pytest.mark.parametrize("name", stopping.SIGNALS)
def test_a_signal_leaves_a_checkpoint(make_experiment, examples, signal_at, tmp_path, name):
    training = {"max_steps": 4, "gate_statistics": False}
    whole = train(make_experiment(training=training), examples=examples, progress=False)
    number = getattr(signal, name)
    before = signal.getsignal(number)
    signal_at(2, number)
    experiment = make_experiment(training=training, output_dir=str(tmp_path / "stopped"))
    result = train(experiment, examples=examples, progress=False)
    assert signal.getsignal(number) is before
    assert result.interrupted
    assert result.checkpoint == experiment.run_dir / "checkpoint-2"
    assert not (experiment.run_dir / "adapter_model.safetensors").exists()
    rest = train(experiment, examples=examples, resume="auto", progress=False)
    assert not rest.interrupted
    want, got = weights(whole.output_dir), weights(rest.output_dir)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_second_stops_at_once(make_experiment, examples, monkeypatch):
    def loss(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGUSR1)  # a scheduler may repeat itself
        os.kill(os.getpid(), signal.SIGINT)
        return REAL_LOSS(*args)

    monkeypatch.setattr(trainer, "answer_loss", loss)
    experiment = make_experiment()
    with pytest.raises(KeyboardInterrupt):
        train(experiment, examples=examples, progress=False)
    assert not list(experiment.run_dir.glob("checkpoint-*"))


def test_nohup_is_respected(make_experiment, examples, signal_at):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signal_at(1, signal.SIGHUP)
        result = train(make_experiment(training={"max_steps": 2}), examples=examples, progress=False)
        assert not result.interrupted
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_time_limit(make_experiment, food, tmp_path, capsys, caplog):
    """And a job that is queued again with the same command ends the run in the end."""
    experiment = make_experiment(training={"max_steps": 3, "max_minutes": 1e-4})
    file = tmp_path / "config.yaml"
    file.write_text(dump_experiment(experiment))
    command = ["train", str(file), "--quiet", "--resume", "auto"]
    for step in (1, 2, 3):
        assert main(command) == 130
        assert (
            f"stopped at step {step}; go on with --resume ({experiment.run_dir / f'checkpoint-{step}'})"
            in capsys.readouterr().err
        )
    assert "training.max_minutes are over" in caplog.text
    assert main(command) == 0
    assert "adapter in" in capsys.readouterr().out
    assert main(command) == 0
    assert "is done after 3 steps" in capsys.readouterr().out


def test_auto_does_not_begin_over_damaged_checkpoints(make_experiment, examples):
    experiment = make_experiment(training={"max_steps": 1})
    result = train(experiment, examples=examples, resume="auto", progress=False)
    (result.checkpoint / "optimizer.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        train(experiment, examples=examples, resume="auto", progress=False)


@pytest.mark.parametrize("minutes", [0, -1])
def test_a_time_limit_that_cannot_be(make_experiment, minutes):
    with pytest.raises(ConfigError, match=r"training.max_minutes: expected more than 0"):
        make_experiment(training={"max_minutes": minutes})
