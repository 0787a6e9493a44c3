from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rode_food.lines.words import singular
from rode_food.usda import Matcher, UsdaError, load_foods
from rode_food.usda.names import CommonFood, common_foods, normalise, simpler
from tiny_usda import tiny_common, tiny_table


@pytest.fixture(scope="module")
def matcher():
    return Matcher(tiny_table(), "recipe", tiny_common())


@pytest.mark.parametrize(
    ("name", "normal"),
    [
        ("Jalapeño Peppers (2)", "jalapeno pepper"),
        ("confectioners' sugar", "confectioner sugar"),
        ("All-Purpose Flour", "all purpose flour"),
        ("bay leaves", "bay leaf"),
        ("Tomatoes", "tomato"),
        ("Berries", "berry"),
        ("hummus", "hummus"),
        ("asparagus", "asparagus"),
        ("radishes", "radish"),
        ("cloves", "clove"),
        ("50% ...", ""),
    ],
)
def test_normalise(name, normal):
    assert normalise(name) == normal


@given(st.text(max_size=60))
def test_normalise_twice_is_once(text):
    once = normalise(text)
    assert normalise(normalise(once)) == normalise(once)


@given(
    st.sampled_from(["onion", "tomato", "berry", "radish", "egg", "leaf", "box", "glass", "clove", "potato"])
)
def test_plural_and_singular_meet(word):
    plural = {"leaf": "leaves", "berry": "berries"}.get(
        word, word + ("es" if word.endswith(("o", "sh", "x", "ss")) else "s")
    )
    assert singular(plural) == singular(word) == word


def test_simpler_keeps_the_full_name_first():
    assert simpler("large ripe bell pepper slice") == [
        "large ripe bell pepper slice",
        "bell pepper slice",
        "bell pepper",
    ]
    assert simpler("little bit of flour")[-1] == "flour"


@pytest.mark.parametrize(
    ("names", "id", "how"),
    [
        ("Eggs", "00002", "map"),
        ("2 large fresh eggs", "00002", "map"),
        (["nothing here", "garlic cloves"], "00003", "map"),  # any reading, by the map first
        ("rice", "00007", "map"),
        ("cooked rice", "00008", "map"),
        ("winter squash", "00011", "automatic"),  # and not the brand's soup
    ],
)
def test_match(matcher, names, id, how):
    match = matcher.match(names)
    assert (match.food.id, match.how) == (id, how)


@pytest.mark.parametrize(
    "name", ["unicorn", "cooked egg", "egg slicer", "flour tortilla", "pumpkin soup", ""]
)
def test_no_match(matcher, name):
    """Not what is unknown, nor what the map knows raw only, nor what only begins or ends like a food."""
    assert matcher.match(name) is None


def test_served_means_what_lies_on_the_plate():
    matcher = Matcher(tiny_table(), "served", tiny_common())
    assert matcher.match("rice").food.id == "00008"
    assert matcher.match("egg").food.id == "00002"


def test_a_can_is_tried_canned_first():
    common = tiny_common() | {"canned egg": CommonFood("canned egg", "00001", "00001", "", "")}
    matcher = Matcher(tiny_table(), "recipe", common)
    assert matcher.match("eggs", canned=True).food.id == "00001"
    assert matcher.match("eggs").food.id == "00002"
    assert matcher.match("garlic", canned=True).food.id == "00003"


def test_tables_without_the_maps_foods_are_refused():
    with pytest.raises(
        UsdaError, match=r"none of the \d+ common foods is among these 11 foods; take SR Legacy"
    ):
        Matcher(tiny_table())


@pytest.mark.data
def test_real_names(rode_data):
    matcher = Matcher(load_foods(rode_data / "usda"))
    expected = {
        "extra-virgin olive oil": "04053",
        "cooking oil": "04044",
        "kosher salt": "02047",
        "scallions": "11291",
        "boneless, skinless chicken breasts": "05062",
        "freshly ground black pepper": "02030",
        "unsalted butter, softened": "01145",
        "confectioners' sugar": "19336",
    }
    for name, id in expected.items():
        match = matcher.match(name)
        assert (match.food.id, match.how) == (id, "map"), name
    assert matcher.match("passion fruit").food.description.startswith("Passion-fruit")


def test_common_foods_are_keyed_by_their_normal_form():
    assert all(normalise(row.name) == key for key, row in common_foods().items())
