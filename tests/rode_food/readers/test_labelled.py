"""Food-101, Food2K and VireoFood: one class a picture."""

from __future__ import annotations

from pathlib import Path

import pytest

from published_layouts import write_food2k, write_food101, write_lines, write_picture, write_vireo
from rode_food.readers import READERS, guess_kind, read_source
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient, RecordError


def read(kind: str, folder: Path) -> tuple[list[FoodRecord], ReadLog]:
    log = ReadLog()
    return list(read_source(kind, folder, log)), log


def told(log: ReadLog, folder: Path) -> list[str]:
    return [str(p).removeprefix(f"{folder}/") for p in log.problems]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("below", ["", "food-101"])
def test_food101(tmp_path: Path, as_json: bool, below: str) -> None:
    folder = write_food101(tmp_path / below, ["apple_pie/1", "sushi/7"], ["sushi/8"], as_json=as_json)
    assert guess_kind(tmp_path) == "food-101"
    records, log = read("food-101", tmp_path)
    assert not log.counts
    assert records[0] == FoodRecord(
        id="apple_pie/1",
        image=str(folder / "images" / "apple_pie" / "1.jpg"),
        source="food-101",
        category="apple pie",
        split="train",
    )
    assert [(r.id, r.category, r.split) for r in records[1:]] == [
        ("sushi/7", "sushi", "train"),
        ("sushi/8", "sushi", "test"),
    ]


def test_faults_of_food101(tmp_path: Path) -> None:
    write_food101(tmp_path, ["sushi/1"], ["sushi/2"])
    train, test = tmp_path / "meta" / "train.txt", tmp_path / "meta" / "test.txt"
    train.write_bytes(b"sushi/1\nsushi/3\n\nburger/4\nsushi/../../5\nsushi/\xff\n")
    write_lines(test, ["sushi/2", "sushi/1"])
    records, log = read("food-101", tmp_path)
    assert [r.id for r in records] == ["sushi/1", "sushi/2"]
    assert told(log, tmp_path) == [
        "meta/train.txt:2: no picture on disk: sushi/3.jpg",
        "meta/train.txt:4: an unknown class: burger/4",
        "meta/train.txt:5: a picture outside its folder: '..'",
        "meta/train.txt:6: invalid UTF-8: invalid start byte",
        "meta/test.txt:2: a picture that is listed twice: sushi/1.jpg",
    ]
    test.unlink()
    with pytest.raises(RecordError, match=r"the test split: none of .*test\.txt, .*test\.json exists"):
        read("food-101", tmp_path)
    write_lines(tmp_path / "meta" / "test.json", ["[1]"])
    with pytest.raises(RecordError, match=r"test\.json: expected an object of lists"):
        read("food-101", tmp_path)


def test_food2k(tmp_path: Path) -> None:
    folder = write_food2k(tmp_path, ["Egg_tart", "Mapo tofu"], train=["0/a.jpg", "1/b.jpg"], val=["1/c.jpg"])
    assert guess_kind(tmp_path) == "food2k"
    records, log = read("food2k", tmp_path)
    assert not log.counts
    assert records[0] == FoodRecord(
        id="0/a", image=str(folder / "0" / "a.jpg"), source="food2k", category="Egg tart", split="train"
    )
    assert [(r.id, r.category, r.split) for r in records[1:]] == [
        ("1/b", "Mapo tofu", "train"),
        ("1/c", "Mapo tofu", "val"),
    ]


def test_food2k_by_other_folders_and_lists(tmp_path: Path) -> None:
    write_lines(tmp_path / "Food2k_label" / "food2k_label2name_en.txt", ["0000--egg tart", "one--x", "0002"])
    write_lines(tmp_path / "meta" / "test.txt", ["/0/a.jpg", "/1/a.jpg", "x", "/0/../../a.jpg"])
    write_picture(tmp_path / "Food2k_complete" / "0" / "a.jpg")
    records, log = read("food2k", tmp_path)
    assert [(r.id, r.category, r.split) for r in records] == [("0/a", "egg tart", "test")]
    assert told(log, tmp_path) == [
        "Food2k_label/food2k_label2name_en.txt:2: a class without number and name: one--x",
        "Food2k_label/food2k_label2name_en.txt:3: a class without number and name: 0002",
        "meta/test.txt:2: an unknown class: /1/a.jpg",
        "meta/test.txt:3: an unknown class: x",
        "meta/test.txt:4: a picture outside its folder: '..'",
    ]
    (tmp_path / "Food2k_label" / "food2k_label2name_en.txt").unlink()
    with pytest.raises(RecordError, match="names of the classes: none of"):
        read("food2k", tmp_path)
    (tmp_path / "meta" / "test.txt").unlink()
    with pytest.raises(RecordError, match=r"lists of pictures: no train_finetune\.txt"):
        read("food2k", tmp_path)


@pytest.mark.parametrize(
    ("kind", "images", "lists"),
    [
        ("vireofood-172", "ready_chinese_food", "SplitAndIngreLabel"),
        ("vireofood-172", "VireoFood172_ori", "SplitAndIngreLabel"),
        ("vireofood-251", "VireoFood251_ori", "SplitAndIngreLabel-406"),
    ],
)
def test_vireo(tmp_path: Path, kind: str, images: str, lists: str) -> None:
    write_vireo(
        tmp_path,
        ["Braised Pork", "Mapo_tofu"],
        ["Minced green onion", "Tofu", "Pork"],
        {"/1/1_2.jpg": (1, -1, 1), "/2/3.jpg": (0, 1, 0), "/2/5.jpg": (-1, -1, -1)},
        images=images,
        lists=lists,
        TR=["/1/1_2.jpg"],
        VAL=["/2/3.jpg"],
        TE=["/2/4.jpg", "/2/5.jpg"],
    )
    assert guess_kind(tmp_path) == kind
    records, log = read(kind, tmp_path)
    assert not log.counts
    assert records[0] == FoodRecord(
        id="1/1_2",
        image=f"{tmp_path}/{images}/1/1_2.jpg",
        source=kind,
        category="Braised Pork",
        ingredients=(Ingredient("minced green onion"), Ingredient("pork")),
        split="train",
    )
    assert [(r.category, [i.name for i in r.ingredients], r.split) for r in records[1:]] == [
        ("Mapo tofu", ["tofu"], "val"),
        ("Mapo tofu", [], "test"),
        ("Mapo tofu", [], "test"),
    ]
    assert [str(p) for p in log.noted] == [
        f"{tmp_path}/{lists}/IngreLabel.txt: no ingredient labels: /2/4.jpg"
    ]


def test_faults_of_vireo(tmp_path: Path) -> None:
    write_vireo(
        tmp_path,
        ["a"],
        ["x", "y"],
        {"/1/a.jpg": (1, 0, 1), "/1/b.jpg": (2, 1), "/1/c.jpg": (1, 1)},
        TR=["/1/c.jpg"],
        VAL=[],
        TE=[],
    )
    write_lines(
        tmp_path / "SplitAndIngreLabel" / "TE.txt", ["/2/a.jpg", "/0/a.jpg", "/1/d.jpg", "/1/../c.jpg"]
    )
    records, log = read("vireofood-172", tmp_path)
    assert [r.id for r in records] == ["1/c"]
    assert told(log, tmp_path) == [
        "SplitAndIngreLabel/IngreLabel.txt:1: ingredient labels of another form: expected 2 of 1, 0 or -1, got 3: '1 0 1'",
        "SplitAndIngreLabel/IngreLabel.txt:2: ingredient labels of another form: expected 2 of 1, 0 or -1, got 2: '2 1'",
        "SplitAndIngreLabel/TE.txt:1: an unknown class: /2/a.jpg",
        "SplitAndIngreLabel/TE.txt:2: an unknown class: /0/a.jpg",
        "SplitAndIngreLabel/TE.txt:3: no picture on disk: 1/d.jpg",
        "SplitAndIngreLabel/TE.txt:4: a picture outside its folder: '..'",
    ]
    (tmp_path / "SplitAndIngreLabel" / "FoodList.txt").unlink()
    with pytest.raises(RecordError, match=r"labels: none of .*FoodList\.txt exists"):
        read("vireofood-172", tmp_path)


def test_every_kind_says_what_it_is() -> None:
    for kind, reader in READERS.items():
        assert reader.about, kind
        assert "file" in reader.takes or reader.signs, kind
