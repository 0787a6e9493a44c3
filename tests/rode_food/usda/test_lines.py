from __future__ import annotations

import sys
import types

import pytest

from rode_food.records import Ingredient
from rode_food.usda import lines
from rode_food.usda.lines import Amount, line_of, read_line

pytestmark = pytest.mark.usefixtures("parser")


@pytest.mark.parametrize(
    ("text", "name", "amounts"),
    [
        ("1 1/2 cups all-purpose flour, sifted", "all-purpose flour", [(1.5, 1.5, "cup")]),
        ("3 cloves garlic, minced", "garlic", [(3, 3, "clove")]),
        ("2-3 eggs", "eggs", [(2, 3, "")]),
        ("2 cups (250 g) flour", "flour", [(2, 2, "cup"), (250, 250, "g")]),
        ("Salt Amount = 10 g", "Salt", [(10, 10, "g")]),
        ("Garlic: 4 cloves", "Garlic", [(4, 4, "clove")]),
        ("2 garlic cloves", "garlic", [(2, 2, "clove")]),
        ("9 dl milk", "dl milk", [(9, 9, "dl")]),
        ("1 lb 8 oz beef", "beef", [(1.5, 1.5, "lb")]),
        ("1 cup plus 1 tbsp sugar", "sugar", [(1.0625, 1.0625, "cup")]),
        ("Ginger Slice 6-8 slices", "Ginger", [(6, 8, "slice")]),
        ("salt to taste", "salt", []),
    ],
)
def test_read_line(text, name, amounts):
    line = read_line(text)
    assert line.names[0] == name
    assert [(a.low, a.high, a.unit) for a in line.amounts] == amounts


def test_containers_hold_so_much_each():
    cans, ounces = read_line("2 (6 oz) cans tuna").amounts
    assert (cans.unit, cans.each) == ("can", False)
    assert ounces == Amount(6.0, 6.0, "oz", each=True)


@pytest.mark.parametrize(
    ("ingredient", "names", "amounts"),
    [
        (Ingredient("egg", text="3 large eggs"), ("eggs", "egg"), [(3, "")]),
        (Ingredient("white rice", amount=68.0, unit="g"), ("white rice",), [(68, "g")]),
        (Ingredient("garlic cloves", amount=2.0), ("garlic cloves", "garlic"), [(2, "clove")]),
        (Ingredient("olive oil", amount=2.0, unit="Tablespoons"), ("olive oil",), [(2, "tbsp")]),
        (Ingredient("salt"), ("salt",), []),
    ],
)
def test_line_of_an_ingredient(ingredient, names, amounts):
    line = line_of(ingredient)
    assert line.names == names
    assert [(a.low, a.unit) for a in line.amounts] == amounts


def test_without_the_parser(monkeypatch):
    monkeypatch.setitem(sys.modules, "ingredient_parser", None)
    lines._parser.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"needs ingredient-parser-nlp: pip install 'rode\[data\]'"):
            read_line("a line that no other test reads")
    finally:
        lines._parser.cache_clear()


def test_without_the_tagger(monkeypatch):
    def parse(text):
        raise LookupError("Resource averaged_perceptron_tagger_eng not found")

    module = types.SimpleNamespace(parse_ingredient=parse)
    monkeypatch.setitem(sys.modules, "ingredient_parser", module)
    lines._parser.cache_clear()
    try:
        with pytest.raises(OSError, match=r"nltk.downloader averaged_perceptron_tagger_eng"):
            read_line("another line that no other test reads")
    finally:
        lines._parser.cache_clear()
