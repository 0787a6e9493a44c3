"""Answers are believed only if every number can be true; against a table of real foods as well."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.records import Ingredient, Nutrition, Quantity
from rode_food.unifood.label.prompt import NUMBERS, ingredient_line
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.validate import check_answer, energy_bounds, stated_grams

SETTINGS = LabelSettings()
RICE = {"number": 1, "mass_g": 100, "energy_kcal": 130, "fat_g": 0.3, "protein_g": 2.7, "carbohydrate_g": 28}


def check(*entries, names=("rice",), **more):
    ingredients = [Ingredient(name, text=name) for name in names]
    return check_answer(json.dumps({"ingredients": list(entries), **more}), ingredients, SETTINGS)


def reasons(*entries, names=("rice",)):
    return [problem.reason for problem in check(*entries, names=names)[1]]


def test_a_good_answer():
    micronutrients = [
        {"name": " vitamin  B12", "value": 2, "unit": "µg"},
        {"name": "iron", "value": 1, "unit": "MG"},
    ]
    found, problems = check(
        {**RICE, "number": 2}, {**RICE, "number": 1.0, "micronutrients": micronutrients}, names="ab"
    )
    assert problems == []
    assert found == [
        Nutrition(100, 130, 0.3, 2.7, 28, {"vitamin B12": Quantity(2, "ug"), "iron": Quantity(1, "mg")}),
        Nutrition(100, 130, 0.3, 2.7, 28),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mass_g": -100}, "negative"),
        ({"fat_g": float("inf")}, "not finite"),
        ({"fat_g": None}, "wrong form"),
        ({"fat_g": True}, "wrong form"),
        ({"fat_g": "0.3"}, "wrong form"),
        ({"number": "1"}, "wrong form"),
        ({"number": 1.5}, "wrong form"),
        ({"number": 0}, "unknown ingredient"),
        ({"energy_kcal": 544}, "kilojoules"),
        ({"energy_kcal": 900}, "energy does not fit"),
        ({"energy_kcal": 30}, "energy does not fit"),
        ({"mass_g": 20}, "exceeds the mass"),
        ({"micronutrients": {"iron": 1}}, "wrong form"),
        ({"micronutrients": [{"name": "iron", "value": 1}]}, "unknown unit"),
        ({"micronutrients": [{"name": "iron", "value": 1, "unit": "kcal"}]}, "unknown unit"),
        ({"micronutrients": [{"name": "", "value": 1, "unit": "g"}]}, "wrong form"),
        ({"micronutrients": [{"name": "iron", "value": -1, "unit": "mg"}]}, "negative"),
        ({"micronutrients": [{"name": "sodium", "value": 388, "unit": "g"}]}, "exceeds the mass"),
        ({"micronutrients": 2 * [{"name": "iron", "value": 1, "unit": "mg"}]}, "duplicate micronutrient"),
    ],
)
def test_what_is_wrong_with_one_entry(change, reason):
    assert reasons({**RICE, **change})[0] == reason


def test_every_ingredient_once():
    two = {**RICE, "number": 2}
    assert reasons(RICE, two, names="ab") == []
    assert reasons(RICE, names="ab") == ["missing ingredient"]
    assert reasons(RICE, RICE, two, names="ab") == ["duplicate ingredient"]
    assert reasons(RICE, two, {**RICE, "number": 3}, names="ab") == ["unknown ingredient"]
    assert reasons("rice", two, names="ab") == ["wrong form", "missing ingredient"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not JSON"),
        ("about 400 kcal", "not JSON"),
        ('{"ingredients": [', "not JSON"),
        ('{"ingredients": []} That is all.', "not JSON"),
        ('{"ingredients": [{"number": NaN}]}', "not finite"),
        ("[" * 100_000, "not JSON"),
        ("[]", "wrong form"),
        ("{}", "wrong form"),
        ('{"ingredients": {}}', "wrong form"),
        ('{"ingredients": []}', "missing ingredient"),
        ('{"ingredients": [{"number": 1, "mass_g": 1e999}]}', "not finite"),
        ('{"ingredients": [{"number": 1, "mass_g": 1' + "0" * 400 + "}]}", "not finite"),
    ],
)
def test_what_is_no_answer(text, reason):
    _, problems = check_answer(text, [Ingredient("rice")], SETTINGS)
    assert problems[0].reason == reason


def test_nothing_weighs_nothing():
    nothing = dict.fromkeys(NUMBERS.values(), 0)
    assert reasons({"number": 1, **nothing}) == ["no mass"]
    assert reasons({"number": 1, **nothing}, {**RICE, "number": 2}, names=("water", "rice")) == []


@pytest.mark.parametrize(
    ("name", "entry", "reason"),
    [
        # 40 ml of vodka: 92 kcal and nothing else; the same in kilojoules; water with as much
        ("vodka", (40, 92, 0, 0, 0), None),
        ("vodka", (40, 385, 0, 0, 0), "kilojoules"),
        ("water", (40, 92, 0, 0, 0), "energy does not fit"),
        ("dry white wine", (150, 123, 0, 0.1, 3.9), None),
        ("dry white wine", (150, 515, 0, 0.1, 3.9), "kilojoules"),
        ("grape juice", (150, 123, 0, 0.1, 3.9), "energy does not fit"),
        ("lager", (330, 142, 0, 1.5, 11.7), None),
        # a sweetener is all carbohydrate and no energy; sugar is not
        ("erythritol", (20, 0, 0, 0, 20), None),
        ("sugar", (20, 0, 0, 0, 20), "energy does not fit"),
    ],
)
def test_alcohol_and_sweeteners(name, entry, reason):
    found = reasons({"number": 1, **dict(zip(NUMBERS.values(), entry, strict=True))}, names=(name,))
    assert found == ([] if reason is None else [reason])


def test_fibre_gives_less():
    """100 g of cocoa: 58 g of carbohydrate, 37 of them fibre; 228 kcal, where 4/9/4 says 433."""
    cocoa = {
        "number": 1,
        "mass_g": 100,
        "energy_kcal": 228,
        "fat_g": 13.7,
        "protein_g": 19.6,
        "carbohydrate_g": 57.9,
    }
    assert reasons(cocoa, names=("cocoa",)) == ["energy does not fit"]
    fibre = [{"name": "Dietary fiber", "value": 37, "unit": "g"}]
    assert reasons({**cocoa, "micronutrients": fibre}, names=("cocoa",)) == []


def test_stated_mass():
    assert stated_grams(Ingredient("flour", text="150 g flour")) == 150
    assert stated_grams(Ingredient("flour", 1.0, "lb")) == pytest.approx(453.59237)
    assert stated_grams(Ingredient("tuna", text="2 (6 oz) cans of tuna")) == pytest.approx(340.19, abs=0.01)
    assert stated_grams(Ingredient("flour", 1.0, "cup")) is None
    assert stated_grams(Ingredient("flour", text="1 cup flour", mass=120.0)) is None  # another's estimate
    bacon = [Ingredient("bacon", text="200 g bacon")]

    def found(mass):
        values = {"mass_g": mass, "energy_kcal": 4 * mass, "fat_g": 0.4 * mass, "protein_g": 0.1 * mass}
        entry = {"number": 1, **values, "carbohydrate_g": 0}
        return [p.reason for p in check_answer(json.dumps({"ingredients": [entry]}), bacon, SETTINGS)[1]]

    assert found(200) == found(96) == found(304) == []
    assert found(94) == found(306) == ["not the stated mass"]


def test_the_line_that_is_shown():
    assert ingredient_line(Ingredient("rice", 1.5, "cup")) == "1.5 cup rice"
    assert ingredient_line(Ingredient("egg", 2.0)) == "2 egg"
    assert ingredient_line(Ingredient("salt")) == "salt"
    assert ingredient_line(Ingredient("salt", text=" a pinch\n of salt ")) == "a pinch of salt"


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.floats(),
    st.integers(),
    st.text(max_size=3),
    st.lists(st.integers(), max_size=1),
)
ENTRIES = st.dictionaries(st.sampled_from(["number", *NUMBERS.values(), "micronutrients"]), VALUES)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(ENTRIES, VALUES), max_size=3))
def test_whatever_comes_is_judged(entries):
    """Nothing raises, and what is believed is complete, finite and not negative."""
    found, problems = check_answer(json.dumps({"ingredients": entries}), [Ingredient("rice")], SETTINGS)
    if not problems:
        assert len(found) == 1
        assert all(math.isfinite(v) and v >= 0 for v in (found[0].mass, found[0].energy, found[0].fat))


@pytest.mark.data
def test_real_foods_pass_and_their_kilojoules_do_not(rode_data):
    """USDA SR28, 100 g of each food, fibre given where the table has it: 0.1 % fail the check at the standard tolerances
    (the table's own slips, mostly). In kilojoules, fewer than 0.3 % pass."""
    verdicts, in_kilojoules = Counter(), Counter()
    with (rode_data / "usda" / "sr28_foods.csv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            energy, fat, protein, carb = (float(row[k]) for k in ("kcal", "fat_g", "protein_g", "carb_g"))
            fibre = {"fibre": Quantity(float(row["fiber_g"]), "g")} if row["fiber_g"] else {}
            nutrition = Nutrition(100.0, energy, fat, protein, carb, fibre)
            low, high = energy_bounds(nutrition, row["description"], SETTINGS)
            verdicts[low - SETTINGS.energy_slack <= energy <= high + SETTINGS.energy_slack] += 1
            entry = {"number": 1, "mass_g": 100, "fat_g": fat, "protein_g": protein, "carbohydrate_g": carb}
            entry["energy_kcal"] = energy * 4.184
            if energy >= 20:
                found = check_answer(
                    json.dumps({"ingredients": [entry]}), [Ingredient(row["description"])], SETTINGS
                )[1]
                in_kilojoules[found[0].reason if found else "passed"] += 1
    assert verdicts[False] / verdicts.total() < 0.001
    assert in_kilojoules["passed"] / in_kilojoules.total() < 0.003, in_kilojoules
    assert in_kilojoules["kilojoules"] / in_kilojoules.total() > 0.99, in_kilojoules
