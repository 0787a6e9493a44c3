from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.lines.simple import normalise_unit, parse_amount, parse_ingredient_line

LB, OZ = 453.59237, 28.349523125


@pytest.mark.parametrize(
    ("line", "name", "amount", "unit", "mass"),
    [
        ("~200g (7 oz) smoked bacon cubes", "smoked bacon cubes", 200, "g", 200),
        ("2 onions (medium size)", "onions", 2, None, None),
        ("1 - 2L (1/4 - 1/2 gal) milk", "milk", 1.5, "l", None),
        ("a jar of plum jam", "plum jam", 1, "jar", None),
        ("1½ cups all-purpose flour, sifted", "all-purpose flour", 1.5, "cup", None),
        ("½-1 teaspoon chilli flakes.", "chilli flakes", 0.75, "tsp", None),
        ("1 1/2 lbs ground beef", "ground beef", 1.5, "lb", 1.5 * LB),
        ("1 pound (450g) spaghetti (or a similar shape)", "spaghetti", 1, "lb", LB),
        ("5-6 cloves of garlic, minced", "garlic", 5.5, "clove", None),
        ("2 garlic cloves", "garlic", 2, "clove", None),
        ("3 14oz cans of chopped tomatoes", "tomatoes", 3, "can", None),
        ("2 (6 oz) cans tuna", "tuna", 2, "can", 12 * OZ),
        ("Rice (80 grams)", "rice", 80, "g", 80),
        ("Egg (3)", "egg", 3, None, None),
        ("Onion (Half)", "onion", 0.5, None, None),
        ("Cooking Oil: 10-20ml", "cooking oil", 15, "ml", None),
        ("Chicken = Half (about 700g)", "chicken", 0.5, None, 700),
        ("Salt - 1 1/2 teaspoons", "salt", 1.5, "tsp", None),
        ("Five Spice Powder 20 g", "five spice powder", 20, "g", 20),
        ("Five Spice Powder", "five spice powder", None, None, None),
        ("1 or 2 lemons", "lemons", 1.5, None, None),
        ("[Chicken stock](/stock) 2 dl", "chicken stock", 2, "dl", None),
        ("Pinch of sea salt", "sea salt", 1, "pinch", None),
        ("Handful fresh basil (optional)", "basil", 1, "handful", None),
        ("Glass noodles", "glass noodles", None, None, None),
        ("1,5 kg potatoes", "potatoes", 1.5, "kg", 1500),
        ("0 % fat yoghurt", "0 % fat yoghurt", None, None, None),
        ("1 large carrot, peeled and diced", "carrot", 1, None, None),
        ("- 4 Tbsp butter or margarine", "butter", 4, "tbsp", None),
        ("Oil for frying", "oil", None, None, None),
        ("Pepper to taste", "pepper", None, None, None),
        ("3 tomatoes per person", "tomatoes", 3, None, None),
        ("Crème fraîche", "crème fraîche", None, None, None),
    ],
)
def test_lines(line: str, name: str, amount: float | None, unit: str | None, mass: float | None) -> None:
    found = parse_ingredient_line(line)
    assert found is not None
    assert (found.name, found.amount, found.unit) == (name, amount, unit)
    assert found.mass == (None if mass is None else pytest.approx(mass))


@pytest.mark.parametrize(
    "line", ["For the sauce", "For the sauce:", "Dressing:", "or 400 g of beans", "", "1/2", "---"]
)
def test_lines_that_are_no_ingredient(line: str) -> None:
    assert parse_ingredient_line(line) is None


@pytest.mark.parametrize(
    ("line", "name", "amount", "unit", "mass"),
    [
        ("1/4 cup (30 g) flour", "flour", 0.25, "cup", 30.0),
        ("3/4 cup (150 g) sugar", "sugar", 0.75, "cup", 150.0),
        ("1 1/2 cups (180 g) flour", "flour", 1.5, "cup", 180.0),
        ("½ cup (2 oz) grated cheese", "cheese", 0.5, "cup", 2 * 28.349523125),
        ("2 (400 g) cans tomatoes", "tomatoes", 2.0, "can", 800.0),
        ("1 1/2 (14 oz) cans beans", "beans", 1.5, "can", 1.5 * 14 * 28.349523125),
    ],
)
def test_only_a_number_before_the_bracket_multiplies_its_weight(line, name, amount, unit, mass) -> None:
    found = parse_ingredient_line(line)
    assert (found.name, found.amount, found.unit) == (name, amount, unit)
    assert found.mass == pytest.approx(mass)


@pytest.mark.parametrize(
    ("line", "amount", "unit", "mass"),
    [
        ("1,000 g flour", 1000.0, "g", 1000.0),
        ("1,250.5 g flour", 1250.5, "g", 1250.5),
        ("1,000,000 mg salt", 1e6, "mg", 1000.0),
        ("1,000 - 1,200 g flour", 1100.0, "g", 1100.0),
        ("1,5 kg flour", 1.5, "kg", 1500.0),
        ("0,125 kg flour", 0.125, "kg", 125.0),
        ("flour 1,000 g", 1000.0, "g", 1000.0),
        ("4 cups flour (1,000 g)", 4.0, "cup", 1000.0),
    ],
)
def test_a_comma_before_three_digits_groups_thousands(line, amount, unit, mass) -> None:
    found = parse_ingredient_line(line)
    assert (found.amount, found.unit) == (amount, unit)
    assert found.mass == pytest.approx(mass)


PIECES = ["1", "2/0", "½", "g", "(", ")", "%", "a", "half", "or", "-", "of", "can", "salt", ":", "~", ","]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40) | st.lists(st.sampled_from(PIECES), max_size=9).map(" ".join))
def test_any_line_gives_a_usable_ingredient_or_none(line: str) -> None:
    found = parse_ingredient_line(line)
    if found is not None:
        assert found.name.strip() == found.name != ""
        assert found.amount is None or 0 <= found.amount < float("inf")


@pytest.mark.parametrize(
    ("text", "amount"),
    [("1 1/2", 1.5), ("1/4", 0.25), ("8", 8.0), ("2-3", 2.5), ("½", 0.5), ("1½", 1.5), ("half a", 0.5), ("", None), ("some", None)],
)  # fmt: skip
def test_amounts_alone(text: str, amount: float | None) -> None:
    assert parse_amount(text) == amount


@pytest.mark.parametrize(
    ("text", "unit"),
    [
        ("Tablespoons", "tbsp"),
        ("tbs.", "tbsp"),
        ("ounce", "oz"),
        ("fl  OZ", "fl oz"),
        (" ", None),
        ("", None),
    ],
)
def test_units_alone(text: str, unit: str | None) -> None:
    assert normalise_unit(text) == unit
