"""Weighed food and groceries: objects stay together, and nutrition is grams times USDA's values."""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from rode.cli import main
from rode_food.readers import guess_kind, read_source
from rode_food.readers.log import ReadLog
from rode_food.readers.weighed_food import Weighed, choices, splits_of
from rode_food.records import FoodRecord, Ingredient, Nutrition, RecordError
from rode_food.usda.tables import UsdaError, load_foods
from tiny_usda import write_sr28_csv


def portion(name: str, *foods: tuple[str, float], photographs: int = 1) -> list[dict]:
    return [
        {
            "id": f"{name}_side_{number}",
            "image": f"images/{name}_side_{number}.jpg",
            "object": name,
            "view": "side",
            "foods": [{"food": food, "grams": grams, "volume_ml": 2 * grams} for food, grams in foods],
        }
        for number in range(1, photographs + 1)
    ]


def weighed(folder: Path, *entries: dict) -> Path:
    (folder / "weighed_food").mkdir(parents=True)
    (folder / "weighed_food" / "photos.json").write_text(json.dumps(entries))
    return folder / "weighed_food"


def tables(folder: Path) -> Path:
    """A table in which an apple is 00002 (140 kcal, 10 g fat, 12 g protein, 1 g carbohydrate) and a pear 00005."""
    folder.mkdir(parents=True)
    write_sr28_csv(folder, {"00002": choices()["apple"].ndb_no, "00005": choices()["pear"].ndb_no})
    return folder


def read(folder: Path, kind: str = "weighed-food", **options: str) -> tuple[list[FoodRecord], ReadLog]:
    log = ReadLog()
    return list(read_source(kind, folder, log, **options)), log


def test_a_mix_is_the_sum_of_its_foods(tmp_path: Path) -> None:
    source = weighed(tmp_path, *portion("mix1", ("apple", 50), ("pear", 10)))
    tables(tmp_path / "usda")
    assert guess_kind(source) == "weighed-food"
    records, log = read(source)
    apple = Nutrition(mass=50, energy=70, fat=5, protein=6, carb=0.5)
    pear = Nutrition(mass=10, energy=88.4, fat=10, protein=0, carb=0)
    assert records == [
        FoodRecord(
            id="mix1/side_1",
            image=str(source / "images" / "mix1_side_1.jpg"),
            source="weighed-food",
            ingredients=(
                Ingredient("apple", 50, "g", 50, apple),
                Ingredient("pear", 10, "g", 10, pear),
            ),
            nutrition=Nutrition(mass=60, energy=158.4, fat=15, protein=6, carb=0.5),
            split="train",
        )
    ]
    assert not log.counts
    assert not log.notes


def test_without_tables_or_without_a_food_the_mass_is_known(tmp_path: Path) -> None:
    source = weighed(tmp_path, *portion("a", ("apple", 50)), *portion("b", ("dragon fruit", 5), ("apple", 1)))
    records, log = read(source)
    assert [r.nutrition for r in records] == [Nutrition(mass=50), Nutrition(mass=6)]
    assert log.notes == {"no USDA tables: mass is the only value": 1}
    records, log = read(source, usda=str(tables(tmp_path / "elsewhere")))
    assert [r.nutrition and r.nutrition.energy for r in records] == [70, None]
    assert log.notes == {"a food without values": 1}
    with pytest.raises(UsdaError, match="is not a folder"):
        read(source, usda=str(tmp_path / "nowhere"))


def test_faults_are_told(tmp_path: Path) -> None:
    good, other = portion("a", ("apple", 50)), portion("a", ("apple", 51))
    entries = [
        *good,
        {**other[0], "id": "a_side_2"},
        {**good[0], "id": "n1", "object": ""},
        {**good[0], "id": "n2", "object": "a/b"},
        {**good[0], "id": "n3", "foods": []},
        {**good[0], "id": "n4", "foods": ["apple"]},
        {**good[0], "id": "n5", "foods": [{"food": "apple", "grams": -1}]},
        {**good[0], "id": "n6", "foods": [{"food": " ", "grams": 1}]},
        {**good[0], "id": "n7", "image": "../a.jpg"},
        {**good[0], "id": "n8", "image": " "},
        {**good[0]},
    ]
    source = weighed(tmp_path, *entries)
    records, log = read(source)
    assert [r.id for r in records] == ["a/side_1"]
    assert list(log.broken) == [
        "foods other than its object's",
        "no name of its object",
        "no foods",
        "a food that is no object",
        "grams that is no finite number >= 0",
        "a food without a name",
        "a picture outside its folder",
        "no image",
        "an id that stands twice",
    ]
    with pytest.raises(RecordError, match="foods other than its object's: a"):
        list(read_source("weighed-food", source, ReadLog(strict=True)))


def objects(**numbers: int) -> dict[str, tuple[Weighed, ...]]:
    """So many objects of each food, each of another weight."""
    return {
        f"{food}{i}": (Weighed(food, 100 + i, None),)
        for food, number in numbers.items()
        for i in range(number)
    }


def test_splits_are_by_object_within_each_food() -> None:
    found = objects(apple=10, pear=4, plum=3, grape=2, fig=1)
    splits = splits_of(found)
    by_food: dict[str, Counter[str]] = defaultdict(Counter)
    for name, split in splits.items():
        by_food[found[name][0].food][split] += 1
    assert by_food == {
        "apple": {"train": 7, "test": 2, "val": 1},
        "pear": {"train": 2, "test": 1, "val": 1},
        "plum": {"train": 2, "test": 1},
        "grape": {"train": 2},
        "fig": {"train": 1},
    }
    assert splits_of(dict(reversed(found.items()))) == splits


def test_a_mix_stays_with_what_it_was_made_of() -> None:
    found = objects(apple=8, pear=8)
    for i in range(6):
        found[f"mix{i}"] = (*found[f"apple{i}"], *found[f"pear{i}"])
    found["mix6"] = (*found["apple5"], Weighed("fig", 3, None))
    found["again"] = found["apple7"]  # of one weight by chance: no mix joins them
    splits = splits_of(found)
    for i in range(6):
        assert len({splits[f"mix{i}"], splits[f"apple{i}"], splits[f"pear{i}"]}) == 1
    assert splits["mix6"] == splits["mix5"]
    assert Counter(splits[f"mix{i}"] for i in range(6)) == {"train": 3, "test": 2, "val": 1}


def test_groceries(tmp_path: Path) -> None:
    entry = {
        "id": "test_Golden-Delicious_001",
        "image": "images/1.jpg",
        "split": "test",
        "product": "Golden Delicious",
        "kind": "Apple",
        "department": "Fruit",
    }
    entries = [entry, {**entry, "id": "2", "split": "dev"}, {**entry, "id": "3", "kind": ""}, {**entry}]
    (tmp_path / "photos.json").write_text(json.dumps(entries))
    assert guess_kind(tmp_path) == "grocery-store"
    records, log = read(tmp_path, "grocery-store")
    assert records == [
        FoodRecord(
            id="Golden-Delicious/test_Golden-Delicious_001",
            image=str(tmp_path / "images" / "1.jpg"),
            source="grocery-store",
            title="Golden Delicious",
            category="Apple",
            split="test",
        )
    ]
    assert log.broken == {
        "an unknown partition": 1,
        "no image, product or kind": 1,
        "an id that stands twice": 1,
    }


def test_a_folder_of_photos_json_that_fits_none_is_called_food_photos(tmp_path: Path) -> None:
    for text in ('[{"id": "a"}]', "[]"):
        (tmp_path / "photos.json").write_text(text)
        assert guess_kind(tmp_path) == "food-photos"


def test_every_choice_is_told_in_the_docs() -> None:
    assert len(choices()) == 19
    text = (Path(__file__).parents[3] / "docs" / "sources.md").read_text()
    for choice in choices().values():
        assert f"| {choice.food} | {choice.ndb_no} | {choice.description} | {choice.reason} |" in text


@pytest.mark.data
def test_the_choices_are_foods_of_sr28(rode_data: Path) -> None:
    table = load_foods(rode_data / "usda")
    for choice in choices().values():
        assert table[choice.ndb_no].description == choice.description


@pytest.mark.data
def test_the_real_photographs(rode_data: Path, tmp_path: Path) -> None:
    source = rode_data / "weighed_food"
    assert guess_kind(source) == "weighed-food"
    records, log = read(source)
    assert (len(records), dict(log.counts), dict(log.notes)) == (2181, {}, {})
    assert all(r.nutrition is not None and r.nutrition.complete for r in records)
    assert {i.name for r in records for i in r.ingredients} == set(choices())
    splits: dict[str, set[str | None]] = defaultdict(set)
    for record in records:
        splits[record.id.partition("/")[0]].add(record.split)
    assert len(splits) == 124
    assert all(len(found) == 1 for found in splits.values())
    assert Counter(split for found in splits.values() for split in found) == {
        "train": 72,
        "val": 19,
        "test": 33,
    }
    assert Counter(r.split for r in records) == {"train": 1296, "val": 266, "test": 619}
    held_out = {i.name for r in records if r.split == "test" for i in r.ingredients}
    trained = {i.name for r in records if r.split == "train" for i in r.ingredients}
    assert held_out == trained - {"grape", "lemon"}
    # by hand: 219 g of apple at 52 kcal, 0.17, 0.26 and 13.81 g; 197.9 g of orange at 47, 0.12, 0.94 and 11.75
    mix = next(r for r in records if r.id.startswith("mix001/"))
    assert mix.nutrition is not None
    assert mix.nutrition.mass == pytest.approx(416.9)
    assert mix.nutrition.energy == pytest.approx(113.88 + 93.013)
    assert mix.nutrition.fat == pytest.approx(0.3723 + 0.23748)
    assert mix.nutrition.protein == pytest.approx(0.5694 + 1.86026)
    assert mix.nutrition.carb == pytest.approx(30.2439 + 23.25325)


@pytest.mark.data
def test_the_real_groceries(rode_data: Path, tmp_path: Path) -> None:
    source, out = rode_data / "grocery_store", tmp_path / "records.jsonl"
    assert guess_kind(source) == "grocery-store"
    records, log = read(source, "grocery-store")
    assert not log.counts
    assert Counter(r.split for r in records) == {"train": 1296, "val": 180, "test": 648}
    assert len({r.category for r in records}) == 43
    assert len({r.title for r in records}) == 81
    assert main(["data", "convert", "grocery-store", str(source), str(out)]) == 0
    assert len(out.read_text().splitlines()) == 2124


def test_the_map_is_a_table_of_four_columns() -> None:
    file = Path(__file__).parents[3] / "python" / "rode_food" / "readers" / "weighed_food.csv"
    with file.open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert {len(row) for row in rows} == {4}
    assert all(all(cell.strip() == cell and cell for cell in row) for row in rows)
