"""How the `rode` command makes OpenMP's threads wait, and what it says of a shared machine."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time

import pytest

from rode.openmp import name_a_shared_machine, sleep_while_waiting
from rode_kernels.backends import cpu

SHOW = """\
import os, sys
from rode.openmp import sleep_while_waiting
sleep_while_waiting()
print(os.getpid(), sys.argv[1:], sys.flags.dev_mode, *(os.environ.get(n, "-") for n in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")))
"""


def environment(**more):
    decided = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    return {name: value for name, value in os.environ.items() if name not in decided} | more


def started(tmp_path, *words, **more):
    """The process's number, and what it printed of itself."""
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    command = [sys.executable, "-X", "dev", str(script), *words]
    run = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**more)
    )
    out, err = run.communicate(timeout=60)
    assert run.returncode == 0, err
    return run.pid, out.strip()


def test_the_same_process_starts_again_once(tmp_path):
    pid, printed = started(tmp_path, "a b", "--x")
    assert printed == f"{pid} ['a b', '--x'] True passive -"


@pytest.mark.parametrize("decided", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "7"}], ids=str)
def test_a_users_decision_stands(tmp_path, decided):
    pid, printed = started(tmp_path, **decided)
    shown = decided.get("OMP_WAIT_POLICY", "-"), decided.get("GOMP_SPINCOUNT", "-")
    assert printed == f"{pid} [] True {' '.join(shown)}"


def test_nothing_starts_again_once_torch_is_loaded(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "execv", lambda *a: pytest.fail("started again"))
    assert "torch" in sys.modules
    sleep_while_waiting()
    assert "OMP_WAIT_POLICY" not in os.environ


def test_the_command_waits_passively():
    """What the runtime says of itself when torch loads it."""
    code = "import sys; sys.argv = ['rode', 'train', '--version']; import rode.__main__ as m; m.sleep_while_waiting(); import torch"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment(OMP_DISPLAY_ENV="true"), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in run.stderr


@pytest.mark.parametrize(("load", "named"), [(0.2, False), (1.0, True), (5.0, True)])
@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_shared_machine_is_named(monkeypatch, caplog, load, named, own):
    """`own` cores were this process's, as in a demo that has worked for a minute before it trains."""
    monkeypatch.setattr(time, "process_time", lambda: 60 * own)
    monkeypatch.setattr(os, "getloadavg", lambda: (load + own, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with caplog.at_level(logging.INFO, logger="rode"):
        name_a_shared_machine(2)
    assert (f"kept {load:.1f} of 2 cores busy" in caplog.text) is named


def test_a_runtime_that_is_loaded_later_is_noticed(monkeypatch, tmp_path, recwarn):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    maps = tmp_path / "maps"
    monkeypatch.setattr("builtins.open", lambda *a, _open=open: _open(maps))
    maps.write_text("7f 0 /a/libgomp-1234.so.1\n8f 0 /a/libgomp-1234.so.1\n")
    cpu.warn_of_two_openmp_runtimes()
    assert not recwarn.list
    maps.write_text("7f 0 /a/libgomp-1234.so.1\n7f 0 /b/libiomp5.so\n")
    with pytest.warns(RuntimeWarning, match="2 OpenMP runtimes"):
        cpu.warn_of_two_openmp_runtimes()
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # two pools of sleeping threads do no harm
    recwarn.clear()
    cpu.warn_of_two_openmp_runtimes()
    assert not recwarn.list
