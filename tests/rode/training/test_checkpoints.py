"""A checkpoint is whole, or --resume says why it is not; no kill and no full disk leaves half of one under its name."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rode.training import disk
from rode.training.checkpoint_writer import ASIDE, rotate
from rode.training.checkpoints import latest_checkpoint, starting_point
from rode.training.config import dump_experiment
from rode.training.disk import DiskFullError
from rode.training.manifest import MANIFEST, damage, write_manifest
from rode.training.train import train


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def names(folder):
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def four_steps(make_experiment, examples):
    """A run of four steps with a checkpoint after the second and the fourth."""
    experiment = make_experiment(training={"max_steps": 4, "save_steps": 2, "save_total_limit": 10})
    train(experiment, examples=examples, progress=False)
    return experiment


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "missing": (Path.unlink, "is missing"),
    "cut": (cut, "has .* bytes instead of"),
    "empty": (lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
    "flipped": (flip, "has changed since it was written"),
}
FILES = ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]


def test_every_file_is_in_the_manifest(four_steps):
    checkpoint = four_steps.run_dir / "checkpoint-4"
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert files.keys() == names(checkpoint) - {MANIFEST} >= {*FILES}
    assert damage(checkpoint) is None
    assert not (four_steps.run_dir / ASIDE).exists()


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(four_steps, examples, caplog, kind):
    """Whichever file it is; and with the one before, the run ends with the same bits."""
    experiment = four_steps
    last, kept = experiment.run_dir / "checkpoint-4", {}
    spoil, words = DAMAGE[kind]
    for name in FILES:
        kept[name] = (last / name).read_bytes()
        spoil(last / name)
        caplog.clear()
        assert starting_point(experiment.run_dir, True).name == "checkpoint-2"
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 1
        assert lines[0].startswith(f"{last} is passed over, as {name} ")
        assert lines[0].endswith(": going on from checkpoint-2")
        with pytest.raises(ValueError, match=f"checkpoint-4: {name} {words}.*; resume from another"):
            starting_point(experiment.run_dir, last)
        (last / name).write_bytes(kept[name])
    whole = weights(experiment.run_dir)
    spoil(last / "optimizer.pt")
    train(experiment, examples=examples, resume=True, progress=False)
    again = weights(experiment.run_dir)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    assert latest_checkpoint(experiment.run_dir) == last  # written anew
    assert damage(last) is None


@pytest.mark.parametrize("text", ["", "[]", '{"files": {"optimizer.pt": 3}}', "null"])
def test_a_damaged_manifest(four_steps, text):
    (four_steps.run_dir / "checkpoint-4" / MANIFEST).write_text(text)
    assert starting_point(four_steps.run_dir, True).name == "checkpoint-2"
    with pytest.raises(ValueError, match=f"checkpoint-4: {MANIFEST} is damaged"):
        starting_point(four_steps.run_dir, four_steps.run_dir / "checkpoint-4")


def test_nothing_but_damaged_checkpoints_is_one_error(four_steps, examples):
    for step in (2, 4):
        cut(four_steps.run_dir / f"checkpoint-{step}" / "scheduler.pt")
    with pytest.raises(
        FileNotFoundError, match=r"no whole checkpoint .*checkpoint-4 is passed over.*checkpoint-2 is passed"
    ):
        train(four_steps, examples=examples, resume=True, progress=False)
    train(four_steps, examples=examples, progress=False)  # and without --resume it trains anew
    assert latest_checkpoint(four_steps.run_dir).name == "checkpoint-4"


def test_a_checkpoint_of_an_older_version(four_steps, caplog):
    """It has no manifest: which files there are is all that is known."""
    last = four_steps.run_dir / "checkpoint-4"
    (last / MANIFEST).unlink()
    assert starting_point(four_steps.run_dir, True) == last
    assert "an older version wrote it" in caplog.text
    (last / "scheduler.pt").unlink()
    caplog.clear()
    assert starting_point(four_steps.run_dir, True).name == "checkpoint-2"
    assert "scheduler.pt is missing, and without it training would go on with other results" in caplog.text
    (last / "trainer_state.json").write_text('{"global_step": 4, "log_hist')
    with pytest.raises(ValueError, match=r"checkpoint-4: trainer_state.json was cut short"):
        starting_point(four_steps.run_dir, last)


KILLED = """
import os, signal, sys
from rode.training import checkpoint_writer
from rode.cli import main
where = checkpoint_writer{inside}
real, calls = where.{name}, []
def kill(*args, **kwargs):
    calls.append(1)
    if {condition}:
        {before}
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
where.{name} = kill
sys.exit(main(["train", {config!r}, "--quiet"]))
"""
SECOND = {"inside": "", "condition": "len(calls) == 2", "before": "pass"}
KILLS = {  # at the writing of the second checkpoint, with one kept
    "before the manifest": ({**SECOND, "name": "write_manifest"}, {"checkpoint-1", ASIDE}),
    "before the rename": ({**SECOND, "name": "sync"}, {"checkpoint-1", ASIDE}),
    "before rotation": ({**SECOND, "name": "rotate"}, {"checkpoint-1", "checkpoint-2", ASIDE}),
    "within rotation": (
        {
            "inside": ".shutil",
            "name": "rmtree",
            "condition": "args[0].name == 'removed-checkpoint-1' and args[0].exists()",
            "before": "os.unlink(args[0] / 'optimizer.pt')",
        },
        {"checkpoint-2", ASIDE},
    ),
}


@pytest.mark.parametrize("when", KILLS)
def test_a_kill_leaves_no_half_of_a_checkpoint(make_experiment, tmp_path, when):
    at, left = KILLS[when]
    experiment = make_experiment(training={"max_steps": 3, "save_steps": 1, "save_total_limit": 1})
    file = tmp_path / "config.yaml"
    file.write_text(dump_experiment(experiment))
    script = KILLED.format(**at, config=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    folders = {path.name for path in experiment.run_dir.iterdir() if path.is_dir()} - {"tensorboard"}
    assert folders == left
    latest = latest_checkpoint(experiment.run_dir)
    assert latest is not None
    assert damage(latest) is None
    rest = train(experiment, resume=True, progress=False)
    assert rest.metrics["steps"] == 3
    assert {p.name for p in rest.output_dir.iterdir() if p.is_dir()} == {"checkpoint-3", "tensorboard"}


def checkpoint(run_dir, step, whole=True):
    folder = run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    write_manifest(folder)
    if not whole:
        (folder / "trainer_state.json").unlink()
    return folder


def test_rotation_counts_whole_ones_only(tmp_path):
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, whole=False)
    checkpoint(tmp_path, 9)  # of a run that went on from 5 before
    newest = checkpoint(tmp_path, 5)
    rotate(tmp_path, newest, 0)
    rotate(tmp_path, newest, None)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 6
    rotate(tmp_path, newest, 2)
    assert names(tmp_path) - {ASIDE} == {f"checkpoint-{step}" for step in (3, 4, 5, 9)}
    rotate(tmp_path, newest, 1)
    assert names(tmp_path) - {ASIDE} == {"checkpoint-5", "checkpoint-9"}


LIMITED = """
import resource, sys
from rode.cli import main
from rode.training import checkpoint_writer
real = checkpoint_writer.Trainer._save_checkpoint
def save(self, *args):
    if self.state.global_step == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, resource.RLIM_INFINITY))
    real(self, *args)
checkpoint_writer.Trainer._save_checkpoint = save
sys.exit(main(["train", {config!r}, "--quiet"]))
"""


@pytest.mark.parametrize("most", [100, 9000])  # in the first file that is written, in a later one
def test_a_full_disk_is_one_sentence(make_experiment, tmp_path, most):
    experiment = make_experiment(training={"max_steps": 3, "save_steps": 1})
    file = tmp_path / "config.yaml"
    file.write_text(dump_experiment(experiment))
    script = LIMITED.format(most=most, config=str(file))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("rode: ")]
    assert len(lines) == 1, done.stderr
    assert "no space left (" in lines[0]
    assert lines[0].endswith(f"make room, and go on with --resume ({experiment.run_dir / 'checkpoint-1'})")
    assert {p.name for p in experiment.run_dir.glob("*") if p.is_dir()} == {"checkpoint-1", "tensorboard"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("basic_ios::clear: iostream error"),
        RuntimeError("[enforce fail at inline_container.cc:862] . unexpected pos 64 vs 0"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_errors_of_full_disks(tmp_path, error):
    with (
        pytest.raises(DiskFullError, match=r"no space left .* start the run anew"),
        disk.names_full_disk(tmp_path),
    ):
        raise error
    with pytest.raises(OSError, match="denied") as caught, disk.names_full_disk(tmp_path):
        raise PermissionError(errno.EACCES, "denied")
    assert not isinstance(caught.value, DiskFullError)


def test_too_little_space_is_said_at_the_start(make_experiment, examples, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(1, 1, 20_000))
    experiment = make_experiment(training={"max_steps": 1})
    result = train(experiment, examples=examples, progress=False)
    lines = [r.getMessage() for r in caplog.records if "training.save_total_limit" in r.getMessage()]
    need = result.metrics["trainable_parameters"] * (3 * 12 + 4) / 1e6
    assert len(lines) == 1
    assert f"will need about {need:.1f} MB, and 0.0 MB are free" in lines[0]
    there = sum(f.stat().st_size for f in result.checkpoint.iterdir())
    assert there >= result.metrics["trainable_parameters"] * 12


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "broken",
    [
        "torch.utils.tensorboard.SummaryWriter.__init__",
        "torch.utils.tensorboard.SummaryWriter.add_text",
        "torch.utils.tensorboard.SummaryWriter.add_scalar",
        "torch.utils.tensorboard.SummaryWriter.close",
        "tensorboard.summary.writer.record_writer.RecordWriter.write",
    ],
)
def test_tensorboard_ends_no_run(make_experiment, examples, monkeypatch, caplog, capfd, broken):
    monkeypatch.setattr(broken, full)
    result = train(make_experiment(training={"max_steps": 2}), examples=examples, progress=False)
    assert (result.output_dir / "training.json").is_file()
    lines = [r.getMessage() for r in caplog.records if "TensorBoard's log ends here" in r.getMessage()]
    assert len(lines) == 1
    assert "Traceback" not in capfd.readouterr().err
