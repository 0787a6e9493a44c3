"""Killed, out of space, cut short, damaged: nothing half written under a final name, nothing lost, one clear line."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest

from forked import forked
from odd_dishes import dishes
from rode.vlm import open_image
from rode_food.images import ImageError, check_image, open_picture
from rode_food.shards.address import ShardError, forget_open_files
from rode_food.shards.index import open_shards
from rode_food.shards.write import write_shards

FORMATS = ("webdataset", "parquet")
SUFFIX = {"webdataset": "tar", "parquet": "parquet"}


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return dishes(tmp_path_factory.mktemp("pictures"), 20)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def kill_at_rename(number: int, after: bool) -> None:
    """SIGKILL to this process at its rename NUMBER, before or after it."""
    rename, calls = os.replace, 0

    def dying(*args):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*args)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("after", [False, True])
def test_killed_at_any_rename_it_goes_on(records, tmp_path, format, after):
    whole = tmp_path / "whole"
    write_shards(records, whole, format=format, size=7)
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        number += 1
        out = tmp_path / f"killed{number}"

        def dying(out=out, number=number):
            kill_at_rename(number, after)
            write_shards(records, out, format=format, size=7)

        code = forked(dying)
        finished = list(out.glob(f"*.{SUFFIX[format]}"))
        for path in finished:  # whatever has its name is whole
            assert path.read_bytes() == (whole / path.name).read_bytes()
        before = {
            p.name: p.stat().st_mtime_ns for p in finished if (out / f"building/{p.name}.json").exists()
        }
        write_shards(records, out, format=format, size=7)
        assert contents(out) == contents(whole)
        for name, time in before.items():  # and is not written twice
            assert (out / name).stat().st_mtime_ns == time
    assert code == 0
    assert number == 1 + 12  # killed at each of: lines, plan, four times shard and entry, samples, index


def test_killed_within_a_shard_nothing_has_its_name(records, tmp_path, monkeypatch):
    from rode_food.shards import formats

    def dying():
        add, calls = formats.TarShard.add, []

        def third(*args):
            calls.append(1)
            if len(calls) == 10:
                os.kill(os.getpid(), signal.SIGKILL)
            add(*args)

        formats.TarShard.add = third
        write_shards(records, tmp_path / "out", size=7)

    assert forked(dying) == -signal.SIGKILL
    visible = [p.name for p in (tmp_path / "out").iterdir() if not p.name.startswith(".")]
    assert sorted(visible) == ["building", "records-train-000000.tar"]
    with pytest.raises(ShardError, match=r"index\.json is missing; it is written last"):
        open_shards(tmp_path / "out")
    write_shards(records, tmp_path / "out", size=7)
    write_shards(records, tmp_path / "whole", size=7)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_killed_writer_of_something_else_leaves_nothing(records, tmp_path):
    def dying():
        kill_at_rename(5, after=True)  # a shard without its entry
        write_shards(records, tmp_path / "out", name="other", size=3)

    assert forked(dying) == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("other-*"))) == 2
    write_shards(records, tmp_path / "out", size=7)
    write_shards(records, tmp_path / "whole", size=7)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_shard_spoiled_while_the_writer_was_dead_is_written_anew(records, tmp_path):
    def dying():
        kill_at_rename(6, after=True)
        write_shards(records, tmp_path / "out", size=7)

    assert forked(dying) == -signal.SIGKILL
    shard = next((tmp_path / "out").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    write_shards(records, tmp_path / "out", size=7)
    write_shards(records, tmp_path / "whole", size=7)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk(records, tmp_path, format):
    """The system's own refusal: no file of this process may grow over 12 kB, more than the lines need and less than a shard."""
    resource = pytest.importorskip("resource")

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        with pytest.raises(OSError, match=rf"File too large: .*out/records-train-000000\.{SUFFIX[format]}'"):
            write_shards(records, tmp_path / "out", format=format, size=12)

    assert forked(full) == 0
    left = {p.name for p in (tmp_path / "out").rglob("*")}
    assert left == {"building", "plan.json", "records.jsonl"}
    write_shards(records, tmp_path / "out", format=format, size=12)
    write_shards(records, tmp_path / "whole", format=format, size=12)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_no_space_left_for_the_index_keeps_the_shards(records, tmp_path, monkeypatch):
    fsync = os.fsync

    def full(number):
        if os.path.exists(f"/proc/self/fd/{number}") and "samples.npy" in os.readlink(
            f"/proc/self/fd/{number}"
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*samples\.npy'"):
        write_shards(records, tmp_path / "out", size=7)
    assert len(list((tmp_path / "out").glob("*.tar"))) == 4
    assert not (tmp_path / "out/index.json").exists()
    assert not (tmp_path / "out/samples.npy").exists()
    monkeypatch.undo()
    write_shards(records, tmp_path / "out", size=7)
    write_shards(records, tmp_path / "whole", size=7)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.fixture(params=FORMATS)
def folder(request, records, tmp_path):
    write_shards(records, tmp_path / "out", format=request.param, size=7)
    return tmp_path / "out"


def test_a_shard_cut_short(folder):
    shards = open_shards(folder)
    image = shards.image(len(shards) - 1)
    path = folder / shards.shards[-1].file
    size, cut = path.stat().st_size, int(shards.samples[-1]["picture"]) + 100
    os.truncate(path, cut)
    # before a run
    with pytest.raises(ShardError, match=rf"{path}: cut short: {cut} bytes, the index says {size}; copy it"):
        open_shards(folder)
    # within one, which opened it before
    forget_open_files()
    with pytest.raises(
        ShardError, match=rf"{path}: cut short: expected \d+ bytes at {cut - 100}, and it has {cut} "
    ):
        open_picture(image)
    with pytest.raises(OSError, match=rf"{path}#\d+\+\d+: not a readable picture \({path}: cut short"):
        open_image(image)
    record = shards.record(0)
    with pytest.raises(ImageError, match=r"record .* cannot be decoded: .*cut short"):
        check_image(type(record)("x", image, "s"))
    with pytest.raises(ShardError, match=f"{path}: damaged: SHA-256 is"):
        shards.verify()


def test_a_flipped_bit(folder):
    shards = open_shards(folder)
    shards.verify()
    path = folder / shards.shards[1].file
    data = bytearray(path.read_bytes())
    row = shards.samples[shards.first[1]]
    data[int(row["picture"]) + 50] ^= 8
    path.write_bytes(data)
    with pytest.raises(
        ShardError, match=rf"{path}: damaged: SHA-256 is \w{{16}}\.\.\., the index says \w{{16}}"
    ):
        open_shards(folder).verify()
    data[int(row["record"])] ^= 8
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{path}: sample 0 is damaged \(.*\); copy the shard again"):
        open_shards(folder).record(int(shards.first[1]))


def test_a_shard_that_is_missing(folder):
    shards = open_shards(folder)
    image = shards.image(0)
    (folder / shards.shards[0].file).unlink()
    with pytest.raises(ShardError, match=r"no such shard, but index\.json names it"):
        open_shards(folder)
    forget_open_files()
    with pytest.raises(ShardError, match="no such shard"):
        open_picture(image)


def test_a_damaged_index(folder):
    good = (folder / "index.json").read_text()
    facts = json.loads(good)
    cases = [
        (good[: len(good) // 2], r"index\.json: damaged \(JSONDecodeError"),
        (json.dumps({**facts, "version": 9}), r"version 9, this program reads 2; write the shards anew"),
        (
            json.dumps({**facts, "tasks": ["category"]}),
            "made for the tasks category; this program has others",
        ),
        (json.dumps({**facts, "format": "zip"}), "unknown format or split"),
        (json.dumps({k: v for k, v in facts.items() if k != "shards"}), "KeyError"),
    ]
    for text, message in cases:
        (folder / "index.json").write_text(text)
        with pytest.raises(ShardError, match=message):
            open_shards(folder)
    (folder / "index.json").write_text(good)
    (folder / "samples.npy").write_bytes((folder / "samples.npy").read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"samples\.npy: missing or damaged"):
        open_shards(folder)


@pytest.mark.parametrize("format", FORMATS)
def test_pictures_that_are_missing_or_bad(tmp_path, format):
    records = dishes(tmp_path / "pictures", 12, split="train")
    Path(records[9].image).unlink()
    Path(records[10].image).write_bytes(Path(records[10].image).read_bytes()[:300])
    with pytest.raises(ImageError, match=r"record 'dish(9|10)': image .* (is missing|cannot be decoded)"):
        write_shards(records, tmp_path / "out", format=format, size=5)
    # the same command with skip goes on from there
    written = write_shards(records, tmp_path / "out", format=format, size=5, on_bad_image="skip")
    assert [id for id, _ in written.left_out] == ["dish10", "dish9"]
    assert written.left_out[1][1] == f"record 'dish9': image {records[9].image} is missing"
    assert written.records == {"train": 10}
    assert str(written).endswith("; left out 2 with a missing or corrupt image")
    shards = open_shards(tmp_path / "out")
    shards.verify()
    assert {r.id for r in map(shards.record, range(10))} == {r.id for r in records} - {"dish9", "dish10"}
    # what was left out is not taken for whole
    with pytest.raises(FileExistsError, match="other records or settings"):
        write_shards(records, tmp_path / "out", format=format, size=5)
    with pytest.raises(ImageError):
        write_shards(records, tmp_path / "out", format=format, size=5, overwrite=True)


def test_a_killed_writer_that_left_out_is_not_gone_on_with_by_one_that_must_not(tmp_path):
    records = dishes(tmp_path / "pictures", 12, split="train")
    Path(records[9].image).unlink()

    def dying():
        kill_at_rename(8, after=True)  # all shards are written, and their entries
        write_shards(records, tmp_path / "out", size=5, on_bad_image="skip")

    assert forked(dying) == -signal.SIGKILL
    with pytest.raises(ImageError, match=f"record 'dish9': image {records[9].image} is missing"):
        write_shards(records, tmp_path / "out", size=5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_shard_of_bad_pictures_alone_is_no_file(tmp_path, format):
    records = dishes(tmp_path / "pictures", 3, split="train")
    for record in records[1:]:
        Path(record.image).write_bytes(b"GIF89a")
    written = write_shards(records, tmp_path / "out", format=format, size=1, on_bad_image="skip")
    assert (written.shards, written.records) == (1, {"train": 1})
    assert open_shards(tmp_path / "out").record(0).id == records[0].id


def test_a_gif_named_jpg_keeps_its_bytes(tmp_path):
    from odd_dishes import picture

    (record,) = dishes(tmp_path / "pictures", 1)
    picture(Path(record.image), 5, "GIF")
    write_shards([record], tmp_path / "out")
    image = open_shards(tmp_path / "out").image(0)
    with open_picture(image) as file:
        assert file.read(6) == b"GIF87a"
    assert open_image(image).tobytes() == open_image(record.image).tobytes()
