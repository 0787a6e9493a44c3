"""One run at a time in a folder: who is refused, and that a lock ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest

from forked import forked
from rode.cli import main
from rode.training.config import dump_experiment
from rode.training.lock import NAME, folder_lock, one_run
from rode.training.train import train

HOLD = """
import multiprocessing, sys, time
from rode.training.lock import folder_lock
with folder_lock(sys.argv[1]):
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    worker.start()
    print(worker.pid, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path / "run", and has forked a worker; (process, the worker's id)."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    yield process, worker
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(worker, signal.SIGKILL)


def test_a_second_run_is_refused_until_the_first_is_gone(make_experiment, food, tmp_path, holder, capsys):
    process, _ = holder
    experiment = make_experiment(training={"max_steps": 1})
    file = tmp_path / "config.yaml"
    file.write_text(dump_experiment(experiment))
    for option in ([], ["--resume"]):
        assert main(["train", str(file), "--quiet", *option]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith(
            f"rode: {experiment.run_dir}: another run is at work there (process {process.pid} on "
        )
    assert [path.name for path in experiment.run_dir.iterdir()] == [NAME]
    process.kill()  # its worker lives on
    process.wait()
    assert main(["train", str(file), "--quiet"]) == 0
    assert (experiment.run_dir / "training.json").is_file()
    assert not (experiment.run_dir / NAME).exists()


def test_two_threads_of_one_process(tmp_path):
    with folder_lock(tmp_path):
        found = []

        def second():
            try:
                with folder_lock(tmp_path):
                    found.append("taken")
            except BlockingIOError as error:
                found.append(str(error))

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert found[0].startswith(f"{tmp_path}: another run is at work there (process {os.getpid()} on ")
    with folder_lock(tmp_path):
        pass


def test_a_forked_child_neither_keeps_nor_ends_the_lock(tmp_path):
    def child():
        with pytest.raises(BlockingIOError), folder_lock(tmp_path):
            pass

    owner = os.getpid()
    with folder_lock(tmp_path):
        assert forked(child) == 0
        leaves = os.fork()
        if leaves:
            os.waitpid(leaves, 0)
            with pytest.raises(BlockingIOError), folder_lock(tmp_path):
                pass
    if os.getpid() != owner:
        os._exit(0)


def test_a_folder_made_for_nothing_goes(make_experiment, tmp_path):
    experiment = make_experiment(output_dir=str(tmp_path / "runs" / "new"))
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        train(experiment, resume=True, progress=False)
    assert not experiment.run_dir.exists()


def test_a_lock_that_is_removed_while_it_is_waited_for(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder ended and another run made a new file: two would hold a lock."""
    real, calls = fcntl.flock, []

    def flock(descriptor, how):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / NAME).unlink()
            (tmp_path / NAME).touch()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder_lock(tmp_path):
        assert len(calls) == 2
        with pytest.raises(BlockingIOError), folder_lock(tmp_path):
            pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_said_once(make_experiment, examples, monkeypatch, caplog, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = train(make_experiment(training={"max_steps": 1}), examples=examples, progress=False)
    assert (result.output_dir / "training.json").is_file()
    lines = [r.getMessage() for r in caplog.records if "cannot be locked" in r.getMessage()]
    assert len(lines) == 1
    assert os.strerror(number) in lines[0]


def test_a_read_only_folder(tmp_path, monkeypatch, caplog):
    def open_(path, *_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(os, "open", open_)
    with folder_lock(tmp_path):
        pass
    assert "cannot be locked" in caplog.text


def test_other_processes_of_the_run_are_let_in(tmp_path):
    """Rank 0 alone locks; that ranks hear of a refusal is tested with torchrun."""
    with folder_lock(tmp_path), one_run(tmp_path, SimpleNamespace(process_index=1, world_size=1)):
        pass


@pytest.mark.slow
def test_two_processes_are_refused_in_one_sentence(make_experiment, tmp_path, holder):
    experiment = make_experiment(training={"max_steps": 1, "devices": 2, "batch_size": 2})
    file = tmp_path / "config.yaml"
    file.write_text(dump_experiment(experiment))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, "-m", "rode", "train", str(file), "--quiet"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.count("another run is at work there") == 1
    assert [path.name for path in experiment.run_dir.iterdir()] == [NAME]
