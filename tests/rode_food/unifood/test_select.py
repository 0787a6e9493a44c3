from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from made_up_dishes import dishes, paint
from rode_food.images import ImageError
from rode_food.records import FoodRecord, Ingredient, read_records, write_records
from rode_food.unifood import select
from rode_food.unifood import stage as stage_module
from rode_food.unifood.engines import make_engine
from rode_food.unifood.select import _Candidates, _order, hash_pictures
from rode_food.unifood.stage import Stage
from tagger import need_tagger

from .conftest import small_settings

MakeStage = Callable[..., Stage]


def ids(stage: Stage) -> list[str]:
    return [record.id for record in read_records(stage.output)]


def test_a_small_source_is_taken_whole_in_its_order(tmp_path: Path, stage: MakeStage) -> None:
    source = dishes(tmp_path / "in", 12)
    one = stage("select", small_settings(source, size=100))
    report = select.run(one)
    assert ids(one) == [f"dish{i:05d}" for i in range(12)]
    assert report["records"] == report["candidates"] == report["read"] == 12
    assert report["splits"] == {"train": 6, "val": 3, "test": 3}
    assert {record.source for record in read_records(one.output)} == {"unifood"}
    assert sorted(path.name for path in one.folder.iterdir()) == [
        "candidates.json", "candidates.jsonl", "candidates.npz", "categories.json", "problems.txt", "records.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("engine", ["local", pytest.param("ray", marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [1, 2])
def test_lines_are_read_by_the_library_after_selection(
    tmp_path: Path, stage: MakeStage, engine: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_tagger()
    monkeypatch.setenv("RODE_LINES_CACHE", "off")  # each worker reads them itself
    monkeypatch.setattr(stage_module.Stage.in_parts, "__defaults__", (2,))
    source = dishes(tmp_path / "in", 4)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    for row in rows:
        row["ingredients"] = [
            {"name": "x 400g tin tomatoes", "amount": 1, "text": "1 x 400g tin tomatoes"},
            {"name": "water", "amount": 14, "unit": "cup", "text": "14 cup water"},
        ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one = stage("select", small_settings(source, size=100), engine=make_engine(engine, workers))
    report = select.run(one)
    assert report["noted"] == {"a lost slash": 4}
    assert "lines" not in report
    for record in read_records(one.output):
        assert [(i.name, i.amount, i.unit, i.mass) for i in record.ingredients] == [
            ("tomatoes", 1, "tin", 400),
            ("water", 0.25, "cup", None),
        ]


def test_the_same_picture_is_in_one_split_only(tmp_path: Path, stage: MakeStage) -> None:
    source = dishes(tmp_path / "in", 8, splits=("train", "train", "val", "test"))
    picture = [tmp_path / "in" / "images" / f"{i:05d}.jpg" for i in range(8)]
    shutil.copy(picture[3], picture[0])  # train as test
    with Image.open(picture[3]) as image:  # val as test, smaller and coarser
        image.resize((80, 80)).save(picture[2], quality=60)
    shutil.copy(picture[6], picture[1])  # train as val
    shutil.copy(picture[4], picture[5])  # both in train: stay
    one = stage("select", small_settings(source, size=100))
    report = select.run(one)
    assert ids(one) == ["dish00003", "dish00004", "dish00005", "dish00006", "dish00007"]
    assert report["near_duplicates"] == 3


def test_dropped_pictures_are_made_up_for(tmp_path: Path, stage: MakeStage) -> None:
    source = dishes(tmp_path / "in", 40, splits=("train", "test"))
    images = tmp_path / "in" / "images"
    for i in range(0, 20, 2):
        shutil.copy(images / f"{i + 1:05d}.jpg", images / f"{i:05d}.jpg")
    (images / "00022.jpg").write_bytes((images / "00022.jpg").read_bytes()[:400])
    one = stage("select", small_settings(source, size=25))
    report = select.run(one)
    assert report["records"] == 25
    assert report["near_duplicates"] > 0
    kept = set(ids(one))
    assert not any(f"dish{i:05d}" in kept and f"dish{i + 1:05d}" in kept for i in range(0, 20, 2))


def test_categories_take_turns_and_splits_keep_their_proportion(tmp_path: Path, stage: MakeStage) -> None:
    rows = [name for name, count in (("soup", 40), ("pie", 12), ("curry", 4)) for _ in range(count)]
    records = [
        FoodRecord(
            f"{name}{i}",
            str(paint(tmp_path / "in" / f"{i}.jpg", i)),
            "s",
            category=name,
            ingredients=(Ingredient("a"), Ingredient("b")),
            split=("train", "train", "train", "test")[i % 4],
        )
        for i, name in enumerate(rows)
    ]
    write_records(tmp_path / "in" / "r.jsonl", records)
    one = stage("select", small_settings(tmp_path / "in" / "r.jsonl", size=24))
    report = select.run(one)
    assert report["splits"] == {"train": 18, "val": 0, "test": 6}
    taken = Counter((record.split, record.category) for record in read_records(one.output))
    # the curries are all taken (3 and 1), the rest is shared by pies and soups
    assert (taken["train", "curry"], taken["test", "curry"]) == (3, 1)
    assert {taken["train", "pie"], taken["train", "soup"]} == {7, 8}
    assert {taken["test", "pie"], taken["test", "soup"]} == {2, 3}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3)), min_size=1, max_size=60),
    st.integers(0, 2**32),
)
def test_every_beginning_is_balanced(rows: list[tuple[int, int]], seed: int) -> None:
    split, category = (np.array(column, dtype=np.int8) for column in zip(*rows, strict=True))
    hashes = np.random.default_rng(seed).permutation(len(rows)).astype(np.uint64)
    order = _order(_Candidates(Path(), np.zeros(0), split, category.astype(np.int32), hashes))
    assert sorted(order.tolist()) == list(range(len(rows)))
    for length in range(1, len(rows) + 1):
        taken = order[:length]
        for s in set(split.tolist()):
            mine = taken[split[taken] == s]
            assert abs(len(mine) - length * np.mean(split == s)) <= 2
            counts = Counter(category[mine].tolist())
            for c in set(category[split == s].tolist()):
                whole = int(np.sum((split == s) & (category == c)))
                # a category is behind the fullest one by more than a turn only where it has no more to give
                assert counts[c] >= min(whole, max(counts.values(), default=0) - 1)


def test_a_larger_sample_holds_the_smaller_one(tmp_path: Path, stage: MakeStage) -> None:
    source = dishes(tmp_path / "in", 40)
    small = stage("small", small_settings(source, size=10))
    large = stage("large", small_settings(source, size=20))
    other = stage("other", small_settings(source, size=10, seed=1))
    for one in (small, large, other):
        select.run(one)
    assert set(ids(small)) < set(ids(large))
    assert set(ids(small)) != set(ids(other))


def test_what_cannot_be_used_is_said(tmp_path: Path, stage: MakeStage) -> None:
    source = dishes(tmp_path / "in", 8)
    records = list(read_records(source))
    images = tmp_path / "in" / "images"
    (images / "00000.jpg").write_bytes(b"<html>404</html>")
    (images / "00001.jpg").unlink()
    Image.new("1", (9000, 9000)).save(images / "00003.png")  # a few kilobytes, 81 megapixels
    (images / "00003.png").replace(images / "00003.jpg")
    Image.new("RGB", (32, 32)).save(images / "00002.gif")
    (images / "00002.gif").replace(images / "00002.jpg")  # a GIF under another name can be decoded
    records[7] = replace(records[7], ingredients=records[7].ingredients[:1])
    write_records(source, records)
    one = stage("select", small_settings(source, source, size=100))
    report = select.run(one)
    assert ids(one) == [f"dish{i:05d}" for i in (2, 4, 5, 6)]
    assert report["left_out"] == {
        "too few or too many ingredients": 2,
        "an id that another source has as well": 7,
    }
    assert report["bad_pictures"] == 3
    problems = (one.folder / "problems.txt").read_text()
    assert "record 'dish00000': image" in problems
    assert "is not a picture that Pillow knows" in problems
    assert "00001.jpg is missing" in problems
    assert "00003.jpg cannot be decoded: 9000 x 9000 pixels, more than 64,000,000" in problems
    strict = stage("strict", small_settings(source, size=100, on_bad_image="error"))
    with pytest.raises(ImageError, match=r"record 'dish0000[013]': image"):
        select.run(strict)
    assert not strict.output.exists()


def test_records_without_a_split_are_given_one_by_their_id(tmp_path: Path, stage: MakeStage) -> None:
    source = dishes(tmp_path / "in", 30)
    write_records(source, [replace(record, split=None) for record in read_records(source)])
    one = stage("select", small_settings(source, split_fractions={"train": 0.5, "test": 0.5}))
    report = select.run(one)
    assert report["splits"]["val"] == 0
    assert min(report["splits"]["train"], report["splits"]["test"]) > 5


def test_sources_are_read_once(tmp_path: Path, stage: MakeStage, monkeypatch: pytest.MonkeyPatch) -> None:
    source = dishes(tmp_path / "in", 12)
    one = stage("select", small_settings(source, size=6), key="a")
    select.run(one)
    before = one.output.read_bytes()
    source.unlink()
    select.run(one)  # as after a crash in the last step
    assert one.output.read_bytes() == before
    with pytest.raises(ValueError, match=r"source: .* is not a file"):
        select.run(replace(one, key="b"))


def test_hashes_of_a_picture_and_of_its_copies_are_near(tmp_path: Path) -> None:
    first = paint(tmp_path / "a.jpg", 5, size=600)
    with Image.open(first) as image:
        image.resize((150, 150)).save(tmp_path / "b.png")
    paint(tmp_path / "c.jpg", 6, size=600)
    rows = hash_pictures([json.dumps([name, str(tmp_path / name)]) for name in ("a.jpg", "b.png", "c.jpg")])
    a, b, c = (int(json.loads(row)["hash"], 16) for row in rows)
    assert bin(a ^ b).count("1") <= 4
    assert bin(a ^ c).count("1") > 12
