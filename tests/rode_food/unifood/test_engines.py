from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from rode_food.unifood.engines import LocalEngine, RayEngine, make_engine
from rode_food.unifood.stage import Stage

from .conftest import small_settings


def shout(mark: str, lines: list[str]) -> list[str]:
    return [line.upper() + mark for line in lines if line]


def fail(lines: list[str]) -> list[str]:
    raise ValueError(f"cannot do {lines[0]}")


PARTS = [(i, [f"line {i}", "", f"ä {i}"]) for i in range(7)]
DONE = {i: [f"LINE {i}!", f"Ä {i}!"] for i in range(7)}


@pytest.mark.parametrize("workers", [1, 2])
def test_local_processes(workers: int) -> None:
    assert dict(LocalEngine(workers).map(partial(shout, "!"), PARTS)) == DONE
    assert dict(LocalEngine(workers).map(partial(shout, "!"), [])) == {}
    with pytest.raises(ValueError, match="cannot do line 0"):
        list(LocalEngine(workers).map(fail, PARTS[:1] * 2))


def test_few_parts_are_in_memory() -> None:
    drawn = 0

    def parts() -> object:
        nonlocal drawn
        for part in PARTS * 3:
            drawn += 1
            yield part

    done = LocalEngine(2).map(partial(shout, "!"), parts())  # type: ignore[arg-type]
    next(done)
    assert drawn <= 5
    done.close()  # type: ignore[attr-defined]


@pytest.mark.slow
def test_ray_gives_the_same() -> None:
    engine = RayEngine(2)
    assert dict(engine.map(partial(shout, "!"), PARTS * 3)) == DONE
    assert list(engine.map(partial(shout, "!"), [])) == []


def test_names_and_numbers() -> None:
    assert make_engine("local", 3) == LocalEngine(3)
    assert make_engine("ray", 2) == RayEngine(2)
    assert make_engine("local").workers >= 1
    with pytest.raises(ValueError, match="engine: expected one of local, ray, got 'spark'"):
        make_engine("spark")
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        make_engine("local", 0)


def count_calls(path: str, lines: list[str]) -> list[str]:
    with open(path, "a") as log:
        log.write("x")
    return [line[::-1] for line in lines]


def test_parts_that_are_done_are_not_done_again(tmp_path: Path, stage: Callable[..., Stage]) -> None:
    one = stage("s", small_settings(), key="k")
    log = tmp_path / "log"
    lines = [f"{i:03d}" for i in range(10)]
    function = partial(count_calls, str(log))
    some = one.in_parts("p", function, lines, part=3)
    assert next(some) == "000"
    assert log.read_text() == "xxxx"
    next(one.folder.glob("p.*.parts")).joinpath("000001.jsonl").unlink()  # as if killed before it
    assert list(one.in_parts("p", function, lines, part=3)) == [line[::-1] for line in lines]
    assert log.read_text() == "xxxxx"
    # another key: other settings or another input, so nothing of it is used
    list(replace(one, key="other").in_parts("p", function, lines, part=3))
    assert log.read_text() == "xxxxxxxxx"
    one.drop_parts("p")
    assert list(one.folder.iterdir()) == []


def test_workers_go_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from rode_food.unifood.engines import LocalEngine
sys.path.insert(0, {str(tmp_path)!r})
from work import work
if __name__ == "__main__":
    for _ in LocalEngine(2).map(work, [(i, ["a"]) for i in range(9)]):
        pass
"""
    (tmp_path / "work.py").write_text(
        "import os, pathlib, time\n"
        "def work(lines):\n"
        f"    pathlib.Path({str(tmp_path)!r}, f'{{os.getpid()}}.pid').touch()\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "main.py").write_text(code)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")], env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    try:
        deadline = time.monotonic() + 60
        while len(workers := list(tmp_path.glob("*.pid"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(workers) == 2
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    pids = [int(re.sub(r"\D", "", path.name)) for path in workers]
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
