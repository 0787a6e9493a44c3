"""The stage: shards, the records beside them, and the same end however often it is killed."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from forked import forked
from odd_dishes import dishes
from rode_food.images import ImageError
from rode_food.records import read_records, write_records
from rode_food.shards.index import open_shards
from rode_food.unifood import shard
from rode_food.unifood.engines import LocalEngine
from rode_food.unifood.settings import ShardSettings
from rode_food.unifood.stage import Stage


@pytest.fixture
def stage(tmp_path):
    records = dishes(tmp_path / "pictures", 20)
    write_records(tmp_path / "golden.jsonl", records)
    (tmp_path / "stage").mkdir()
    settings = SimpleNamespace(name="Uni Food", shard=ShardSettings(size=8))
    return Stage(
        "shard", tmp_path / "stage", tmp_path / "golden.jsonl", settings, LocalEngine(), progress=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_it_leaves(stage):
    report = shard.run(stage)
    shards = open_shards(stage.folder / "shards")
    assert report == {
        "records": {"train": 16, "val": 0, "test": 4},
        "shards": 3,
        "bytes": sum(s.bytes for s in shards.shards),
        "left_out": 0,
    }
    assert shards.shards[0].file == "Uni%20Food-test-000000.tar"
    assert list(read_records(stage.output)) == list(stage.records())
    assert {shards.record(i).id for i in range(20)} == {r.id for r in stage.records()}
    before = contents(stage.folder)
    assert shard.run(stage) == report
    assert contents(stage.folder) == before


def test_killed_at_every_rename(stage, tmp_path):
    whole = dataclasses.replace(stage, folder=tmp_path / "whole")
    whole.folder.mkdir()
    report = shard.run(whole)
    code, number = -signal.SIGKILL, 0
    while code == -signal.SIGKILL:
        number += 1
        killed = dataclasses.replace(stage, folder=tmp_path / f"killed{number}")
        killed.folder.mkdir()

        def dying(killed=killed, number=number):
            rename, calls = os.replace, []

            def replace(*args):
                calls.append(1)
                if len(calls) == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                rename(*args)

            os.replace = replace
            shard.run(killed)

        code = forked(dying)
        assert shard.run(killed) == report
        assert contents(killed.folder) == contents(whole.folder)
    assert number == 1 + 11  # lines, plan, three times shard and entry, samples, index, records


def test_other_records_replace_what_was_there(stage, tmp_path):
    shard.run(stage)
    write_records(tmp_path / "golden.jsonl", list(read_records(tmp_path / "golden.jsonl"))[:9])
    report = shard.run(stage)
    assert sum(report["records"].values()) == 9
    fresh = dataclasses.replace(stage, folder=tmp_path / "fresh")
    fresh.folder.mkdir()
    shard.run(fresh)
    assert contents(stage.folder) == contents(fresh.folder)


def test_a_picture_spoiled_since(stage):
    record = list(stage.records())[3]
    Path(record.image).write_bytes(b"no picture")
    with pytest.raises(ImageError, match=rf"record {record.id!r}: image .* is not a picture"):
        shard.run(stage)
    assert not stage.output.exists()
    stage.settings.shard.on_bad_image = "skip"
    report = shard.run(stage)
    assert report["left_out"] == 1
    assert [id for id, _ in open_shards(stage.folder / shard.FOLDER).facts["left_out"]] == [record.id]
    assert record.id not in {r.id for r in read_records(stage.output)}
    assert sum(report["records"].values()) == 19


def test_a_dry_run_writes_nothing(stage):
    report = shard.run(dataclasses.replace(stage, dry_run=True))
    size = sum(Path(r.image).stat().st_size for r in stage.records())
    assert report == {"records": {"train": 16, "test": 4}, "shards": 3, "bytes_of_pictures": size}
    assert not any(stage.folder.iterdir())
