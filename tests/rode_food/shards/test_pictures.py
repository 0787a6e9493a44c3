"""Shards of records with several pictures, with none, and with questions of their own."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from odd_dishes import dishes, picture
from rode_food import Source, load_examples, read_records, write_records
from rode_food.images import open_picture
from rode_food.records import Turn, with_images
from rode_food.shards.address import ShardError
from rode_food.shards.index import open_shards
from rode_food.shards.write import write_shards

FORMATS = ("webdataset", "parquet")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Record N has N % 4 pictures, N % 3 turns."""
    folder = tmp_path_factory.mktemp("pictures")
    made = []
    for number, record in enumerate(dishes(folder, 30, split="train")):
        more = [picture(folder / f"{number}-{i}.jpg", 1000 * i + number) for i in range(1, number % 4)]
        turns = tuple(Turn(f"Is it {number}?" + "!" * i, f"It is {number + i}.") for i in range(number % 3))
        record = dataclasses.replace(record, conversation=turns)
        made.append(with_images(record, [record.image, *more] if number % 4 else []))
    return made


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, records, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "out"
    write_shards(records, folder, name="food", format=request.param, size=7)
    return folder


def bytes_of(images):
    found = []
    for image in images:
        with open_picture(image) as file:
            found.append(file.read())
    return found


def test_every_picture_comes_back(folder, records):
    shards = open_shards(folder)
    shards.verify()
    found = {record.id: record for record in map(shards.record, range(len(shards)))}
    assert len(found) == 30
    for number, record in enumerate(records):
        assert len(record.images) == number % 4
        assert with_images(found[record.id], record.images) == record
        assert bytes_of(found[record.id].images) == [Path(image).read_bytes() for image in record.images]
    sample = next(i for i in range(30) if not shards.images(i))
    assert shards.image(sample) == ""
    assert len(shards.pictures) == sum(max(0, number % 4 - 1) for number in range(30))


@pytest.mark.parametrize("wording", ["first", "all"])
@pytest.mark.parametrize("tasks", [("question",), ("category", "question", "recipe")])
def test_the_same_questions_as_the_file_s(folder, records, tmp_path, wording, tasks):
    def content(examples):
        rows = [
            (tuple(bytes_of(e.images)), dataclasses.replace(e, image="", more_images=())) for e in examples
        ]
        return Counter(map(repr, rows))

    write_records(tmp_path / "r.jsonl", records)
    of_file = load_examples(
        [Source(str(tmp_path / "r.jsonl"), tasks=tasks)], "train", wording=wording
    ).examples
    (of_shards,) = load_examples([Source(str(folder), tasks=tasks)], "train", wording=wording).parts()
    assert content(of_shards) == content(of_file)
    assert {len(e.images) for e in of_file if e.task == "question"} == {0, 1, 2, 3}
    lengths = Counter()
    for example, length in zip(of_shards, of_shards.lengths, strict=True):
        lengths[example.record_id, example.task] += length - len(example.question) - len(example.answer)
    # a record's own questions have their mean length, rounded down
    assert {difference for (_, task), difference in lengths.items() if task != "question"} <= {0}
    assert {difference for (_, task), difference in lengths.items() if task == "question"} <= {0, -1}


def test_without_several_pictures_there_is_no_table_of_them(records, tmp_path):
    few = [record for record in records if len(record.images) < 2]
    write_shards(few, tmp_path / "few")
    assert not (tmp_path / "few" / "pictures.npy").exists()
    write_shards(records, tmp_path / "out")
    table = tmp_path / "out" / "pictures.npy"
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"pictures\.npy: missing or damaged; copy it again"):
        open_shards(tmp_path / "out")
    write_shards(few, tmp_path / "out", overwrite=True)
    assert not table.exists()
    assert len(open_shards(tmp_path / "out")) == len(few)


def test_a_missing_further_picture_leaves_the_record_out(records, tmp_path):
    gone = str(tmp_path / "gone.jpg")
    broken = dataclasses.replace(records[3], more_images=(*records[3].more_images, gone))
    done = write_shards([records[0], broken], tmp_path / "out", on_bad_image="skip")
    assert done.records == {"train": 1}
    assert done.left_out == [(broken.id, f"record {broken.id!r}: image {gone} is missing")]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_others_read_them(records, tmp_path):
    import webdataset
    from datasets import load_dataset

    write_shards(records, tmp_path / "tar", name="food", size=40)
    by_id = {record.id: record for record in records}
    count = 0
    for sample in webdataset.WebDataset(
        [str(tmp_path / "tar" / "food-train-000000.tar")], shardshuffle=False
    ):
        record = by_id[json.loads(sample["json"])["id"]]
        names = ["jpg", "1.jpg", "2.jpg"]
        assert [sample[name] for name in names if name in sample] == bytes_of(record.images)
        count += 1
    assert count == 30
    write_shards(records, tmp_path / "parquet", name="food", format="parquet", size=40)
    rows = load_dataset(
        "parquet",
        data_files={"train": str(tmp_path / "parquet/food-train-*.parquet")},
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    for row in rows:
        record = by_id[row["id"]]
        images = [row["image"], *row["more_images"]] if row["image"] else []
        assert [image.size for image in images] == [(24, 24)] * len(record.images)
        assert [Turn(**turn) for turn in row["conversation"] or ()] == [*record.conversation]


def test_a_file_of_records_keeps_them(records, tmp_path):
    write_records(tmp_path / "r.jsonl", records)
    assert list(read_records(tmp_path / "r.jsonl")) == records
