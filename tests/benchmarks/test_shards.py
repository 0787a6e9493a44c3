"""The benchmark of shards checks that all forms give the same samples, measures each, and prints a table."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

from benchmarks import shards


def options(tmp_path, **changes):
    values = {"records": 8, "shard_size": 3, "window": 2, "rounds": 1, "folder": str(tmp_path), "json": None}
    return Namespace(**(values | changes))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(shards, "PICTURES", 2)
    # whether a cache is dropped is up to the system's moment; that the benchmark refuses to go on is tested below
    monkeypatch.setattr(shards, "fraction_cached", lambda paths: 0.0)


def test_it_measures_every_form(quick, tmp_path, capsys):
    shards.main(options(tmp_path, json=str(tmp_path / "shards.json")))
    found = json.loads((tmp_path / "shards.json").read_text())
    assert found["benchmark"] == "shards"
    rates = [row for row in found["rows"] if "rate" in row]
    assert len(rates) == 3 * 2 * 2 * 2  # forms, orders, caches, with and without decoding
    assert all(0 < row["rate"]["low"] <= row["rate"]["median"] <= row["rate"]["high"] for row in rates)
    starts = [row for row in found["rows"] if "seconds" in row]
    assert [row["form"] for row in starts] == ["loose", "tar", "parquet"]
    printed = capsys.readouterr().out
    assert "| bytes, sequential | warm |" in printed
    assert "| start of a run, s |" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["shards.json"]


def test_it_times_no_wrong_sample(quick, tmp_path, monkeypatch):
    digest = shards.digest
    monkeypatch.setattr(
        shards, "digest", lambda mixture: digest(mixture)[len(mixture.examples[0].image) % 7 :]
    )
    monkeypatch.setattr(shards, "interleaved", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(AssertionError, match="the samples differ"):
        shards.rows(options(tmp_path))


def test_it_refuses_a_cache_that_stays(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "fraction_cached", lambda paths: 0.5)
    with pytest.raises(RuntimeError, match="did not drop these files from its cache"):
        shards.rows(options(tmp_path))


def test_pictures_are_of_a_real_size():
    sizes = [len(data) for data in shards.pictures()]
    assert 45_000 < min(sizes) <= max(sizes) < 75_000
