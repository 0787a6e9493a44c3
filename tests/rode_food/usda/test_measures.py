from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rode_food.lines.reading import Amount, Line
from rode_food.lines.units import CUP, MILLILITRES, unit_name
from rode_food.usda.measures import to_grams
from tiny_usda import tiny_table

TABLE = tiny_table()
FLOUR, EGG, GARLIC, BROTH, OIL, PEPPER, RICE, _, SYRUP, _, SQUASH = TABLE


def grams(food, *amounts, words=""):
    made = [a if isinstance(a, Amount) else Amount(a[0], a[0], a[1]) for a in amounts]
    return to_grams(Line(("x",), tuple(made), words), food)


@pytest.mark.parametrize(
    ("food", "amounts", "words", "expected"),
    [
        (FLOUR, [(2, "cup")], "", 240),
        (FLOUR, [(2, "cup")], "sifted flour", 200),  # the form that the line names
        (FLOUR, [(1, "tbsp")], "", 7.5),
        (FLOUR, [(1, "tsp")], "", 2.5),
        (FLOUR, [(CUP, "ml")], "", 120),
        (FLOUR, [(1, "cup"), (130, "g")], "", 130),  # a weight in brackets wins
        (FLOUR, [(1, "lb")], "", 453.59237),  # and never by the table's own "lb"
        (None, [(0.5, "kg")], "", 500),  # a weight needs no food
        (FLOUR, [Amount(100, 200, "g")], "", 150),  # a range at its middle
        (FLOUR, [(2, "can"), Amount(6, 6, "oz", each=True)], "", 2 * 6 * 28.349523125),
        (EGG, [(2, "")], "", 88),  # medium, where nothing is said
        (EGG, [(2, "")], "large", 100),
        (EGG, [(2, "")], "medium", 88),
        (GARLIC, [(2, "clove")], "", 6),  # the table counts three
        (GARLIC, [(1, "tsp")], "", 2.8),
        (OIL, [(2, "tbsp")], "", 27),
        (OIL, [(1, "pinch")], "", 216 / 48 / 16),
        (SYRUP, [(1, "cup")], "", 312),
        (RICE, [(1, "cup")], "", 185),  # not what a quarter yields
        (PEPPER, [(1, "")], "bell pepper", 119),
        (PEPPER, [(1, "")], "large bell pepper", 164),
        (PEPPER, [(2, "piece")], "", 238),
        (PEPPER, [(5, "strip")], "", 13.5),
        (SQUASH, [(0.5, "")], "", 200),
        (BROTH, [(250, "ml")], "", 250),  # as water, where the table has no volume
    ],
)
def test_by_hand(food, amounts, words, expected):
    assert grams(food, *amounts, words=words).grams == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("food", "amounts", "words", "reason"),
    [
        (FLOUR, [], "", "no amount"),
        (None, [(1, "cup")], "", "no food for its measure"),
        (GARLIC, [(1, "")], "garlic", "no measure of a whole one"),  # a clove is not a whole garlic
        (GARLIC, [(1, "head")], "garlic", "no measure for 'head'"),
        (FLOUR, [(1, "handful")], "", "no measure for 'handful'"),
        (SQUASH, [(1, "cup")], "", "no measure of volume"),  # no density of water for a solid
        (EGG, [(1, "")], "small egg", "no measure of a whole one"),  # the table has no small ones
    ],
)
def test_what_the_table_does_not_tell_stays_unknown(food, amounts, words, reason):
    found = grams(food, *amounts, words=words)
    assert found.grams is None
    assert found.how == reason


def test_a_recipes_egg_is_large():
    usual = dataclasses.replace(EGG, id="01123")
    assert grams(usual, (2, "")).grams == 100
    assert grams(usual, (2, ""), words="medium eggs").grams == 88


def test_how_is_said():
    assert grams(FLOUR, (2, "cup")).how == "1 cup = 120 g"
    assert grams(FLOUR, (2, "g")).how == "weight"
    assert grams(BROTH, (2, "ml")).how == "density of water"


@given(
    count=st.floats(0.01, 1000),
    food=st.sampled_from([f for f in TABLE if f.id in ("00001", "00003", "00005", "00007", "00009")]),
    units=st.tuples(*[st.sampled_from(sorted(MILLILITRES))] * 2),
)
def test_units_of_volume_agree(count, food, units):
    one, other = units
    same = count * MILLILITRES[one] / MILLILITRES[other]
    assert grams(food, (count, one)).grams == pytest.approx(grams(food, (same, other)).grams, rel=1e-9)


@given(st.floats(0.01, 1000))
def test_sixteen_tablespoons_and_fortyeight_teaspoons_are_a_cup(count):
    cup = grams(OIL, (count / 16, "cup")).grams
    assert grams(OIL, (count, "tbsp")).grams == pytest.approx(cup, rel=1e-9)
    assert grams(OIL, (3 * count, "tsp")).grams == pytest.approx(cup, rel=1e-9)


@pytest.mark.parametrize(
    ("written", "unit"),
    [
        ("Tbsps", "tbsp"),
        ("tablespoon", "tbsp"),
        ("fluid_ounce", "fl oz"),
        ("Cloves", "clove"),
        ("large cloves", "clove"),
        ("small pinches", "pinch"),
        ("grams", "g"),
        ("lbs", "lb"),
        ("", ""),
    ],
)
def test_unit_name(written, unit):
    assert unit_name(written) == unit
