"""`rode data shard` and `rode data verify-shards`."""

from __future__ import annotations

import argparse

import pytest

from odd_dishes import dishes
from rode_food.commands import shard as data_shard
from rode_food.records import write_records
from rode_food.shards.address import ShardError
from rode_food.shards.index import open_shards


@pytest.fixture
def rode(capsys):
    """Runs a command; what it printed."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quiet", action="store_true")
    parser = argparse.ArgumentParser()
    data_shard.add_parser(parser.add_subparsers(), parents=[common])

    def run(*words):
        args = parser.parse_args([*map(str, words), "--quiet"])
        assert args.run(args) == 0
        return capsys.readouterr().out

    return run


def test_shards_of_one_s_own_records(rode, tmp_path):
    records = dishes(tmp_path / "pictures", 12)
    write_records(tmp_path / "mine.jsonl", records)
    out = tmp_path / "out"
    told = rode("shard", tmp_path / "mine.jsonl", out, "--size", 5, "--format", "parquet")
    assert told.startswith("12 records (9 train, 3 test) in 3 shards, ")
    assert open_shards(out).shards[0].file == "mine-test-000000.parquet"
    assert rode("verify-shards", out) == f"{out}: 12 records in 3 shards, all as written\n"
    shard = out / "mine-train-000001.parquet"
    shard.write_bytes(shard.read_bytes()[::-1])
    with pytest.raises(ShardError, match=r"mine-train-000001\.parquet: damaged"):
        rode("verify-shards", out)


def test_bad_pictures_and_splits(rode, tmp_path):
    records = dishes(tmp_path / "pictures", 12)
    for record in records[3:10]:
        with open(record.image, "wb") as file:
            file.write(b"?")
    (tmp_path / "mine.jsonl").write_text(
        "".join(f'{{"id": "{i}", "image": "{r.image}", "source": "s"}}\n' for i, r in enumerate(records))
    )
    with pytest.raises(ValueError, match=r"record '0': split: missing"):
        rode("shard", tmp_path / "mine.jsonl", tmp_path / "out")
    told = rode("shard", tmp_path / "mine.jsonl", tmp_path / "out", "--test", 1, "--on-bad-image", "skip")
    first, *left_out, last = told.splitlines()
    assert first.startswith("5 records (5 test) in 1 shards")
    assert first.endswith("; left out 7 with a missing or corrupt image")
    assert len(left_out) == 5
    assert left_out[0].startswith("left out 3: record '3': image ")
    assert last == "... and 2 more, named in index.json"
