from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from rode_food.lines import store
from rode_food.lines.library import Raw, RawAmount
from rode_food.lines.store import Store, cache_path

RAW = Raw(
    ("flour", "starch"),
    (
        RawAmount(1.0, 2.0, "cup", True),
        RawAmount(parts=(RawAmount(1.0, 1.0, "lb"), RawAmount(2.0, 2.0, "oz"))),
    ),
    "large",
    "sifted",
    "好",
)


def test_a_reading_comes_back(tmp_path):
    kept = Store(tmp_path / "new" / "lines.sqlite", "1")
    assert kept.get(["a"]) == {}
    kept.put({"a": RAW, "b": Raw()})
    again = Store(tmp_path / "new" / "lines.sqlite", "1")
    assert again.get(["a", "b", "c"]) == {"a": RAW, "b": Raw()}
    assert again.get(map(str, range(2000))) == {}


def test_another_version_of_the_library_reads_afresh(tmp_path):
    Store(tmp_path / "l", "1").put({"a": RAW})
    assert Store(tmp_path / "l", "2").get(["a"]) == {}


def _write(path: Path, first: int) -> None:
    kept = Store(path, "1")
    for i in range(first, first + 40):
        kept.put({f"line {i}": RAW, "shared": RAW})


def test_several_processes_write_at_a_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path / "l", 40 * i)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(Store(tmp_path / "l", "1").get([f"line {i}" for i in range(120)])) == 120


def test_a_file_that_cannot_be_used_costs_a_warning(tmp_path):
    (tmp_path / "l").write_bytes(b"no database at all, but long enough to be looked at" * 40)
    kept = Store(tmp_path / "l", "1")
    with pytest.warns(UserWarning, match=r"l: ingredient lines cannot be kept there .* set RODE_LINES_CACHE"):
        assert kept.get(["a"]) == {}
    kept.put({"a": RAW})
    assert kept.get(["a"]) == {}


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "x"))
    assert cache_path() == tmp_path / "x"
    monkeypatch.setenv(store.CACHE_VARIABLE, "off")
    assert cache_path() is None
    monkeypatch.delenv(store.CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path() == tmp_path / "rode" / "ingredient_lines.sqlite"
