from __future__ import annotations

import sys
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.lines import library
from rode_food.lines.reading import Amount, line_of, read_line, read_lines, stated_mass, to_ingredient
from rode_food.lines.simple import is_heading
from rode_food.records import Ingredient

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


OZ, LB = 28.349523125, 453.59237
KITCHENS = [
    ("1/4 cup (30 g) flour", "flour", 0.25, "cup", 30),
    ("1 1/2 cups (180 g) flour", "flour", 1.5, "cup", 180),
    ("½ cup (75 g) pumpkin seeds", "pumpkin seeds", 0.5, "cup", 75),
    ("375ml/13fl oz red wine", "red wine", 375, "ml", None),
    ("1 cup | 200g sugar", "sugar", 1, "cup", 200),
    ("312 g/11 oz/1 1/3 cups hot milk", "milk", 312, "g", 312),
    ("1-1/2 cups sugar", "sugar", 1.5, "cup", None),
    ("1,000 g potatoes", "potatoes", 1000, "g", 1000),
    ("1 200 g potatoes", "potatoes", 1200, "g", 1200),
    ("1,5 kg potatoes", "potatoes", 1.5, "kg", 1500),
    (".5 cup milk", "milk", 0.5, "cup", None),
    ("80/20 ground beef", "ground beef (80/20)", None, None, None),
    ("1 lb 80/20 ground beef", "ground beef (80/20)", 1, "lb", LB),
    ("1 and 1/2 tsp salt", "salt", 1.5, "tsp", None),
    ("8 fl oz milk", "milk", 8, "fl oz", None),
    ("1 c. sugar", "sugar", 1, "cup", None),
    ("1 lg. onion, chopped", "onion", 1, None, None),
    ("1 pkg. yeast", "yeast", 1, "package", None),
    ("1 qt. tomatoes", "tomatoes", 1, "quart", None),
    ("1 T. oil", "oil", 1, "tbsp", None),
    ("2 (10 oz.) pkgs. spinach", "spinach", 2, "package", 20 * OZ),
    ("2 cans (400 g each) tomatoes", "tomatoes", 2, "can", 800),
    ("1 (14-ounce) can tomatoes", "tomatoes", 1, "can", 14 * OZ),
    ("1 lb 8 oz beef", "beef", 1.5, "lb", 1.5 * LB),
    ("500g/1lb 2oz flour", "flour", 500, "g", 500),
    ("1 x 400g tin tomatoes", "tomatoes", 1, "tin", 400),
    ("2 x 400g tins tomatoes", "tomatoes", 2, "tin", 800),
    ("400g/14oz tin kidney beans", "kidney beans", 400, "g", 400),
    ("1 cup plus 2 tablespoons flour", "flour", 1.125, "cup", None),
    ("1 cup minus 2 tablespoons flour", "flour", 0.875, "cup", None),
    ("juice of 1/2 lemon", "lemon", 0.5, None, None),
    ("1 dozen eggs", "eggs", 12, None, None),
    ("half a dozen eggs", "eggs", 6, None, None),
    ("1/3rd cup milk", "milk", 1 / 3, "cup", None),
    ("14 cup boiling water", "water", 0.25, "cup", None),
    ("1 12 cups flour", "flour", 1.5, "cup", None),
    ("1&frac12; cups flour", "flour", 1.5, "cup", None),
    ("salt &amp; pepper", "salt & pepper", None, None, None),
    ("• 2 cups sugar", "sugar", 2, "cup", None),
    ("- 1 cup sugar", "sugar", 1, "cup", None),
    ("salt to taste", "salt", None, None, None),
    ("a little oil", "oil", None, None, None),
    ("猪肉 500克", "猪肉", 500, "g", 500),
    ("鸡蛋 2个", "鸡蛋", 2, None, None),
    ("醤油 大さじ2", "醤油", 2, "tbsp", None),
]


@pytest.mark.parametrize(("text", "name", "amount", "unit", "mass"), KITCHENS)
def test_lines_of_real_kitchens(text, name, amount, unit, mass):
    found = to_ingredient(read_line(text), text)
    assert found is not None
    assert (found.name, found.unit, found.text) == (name, unit, text)
    assert found.amount == (None if amount is None else pytest.approx(amount))
    assert found.mass == (None if mass is None else pytest.approx(mass))


@pytest.mark.parametrize("fraction", ["1/4", "1/3", "1/2", "¾", "2/3", "1 1/2", "2 1/4"])
@pytest.mark.parametrize("unit", ["cup", "tbsp", "can", "package", ""])
@pytest.mark.parametrize("weight", ["30 g", "4 oz"])
def test_a_weight_in_brackets_is_not_multiplied_by_a_fraction(fraction, unit, weight):
    grams = 30 if weight == "30 g" else 4 * OZ
    assert stated_mass(read_line(f"{fraction} {unit} ({weight}) chopped nuts")) in (
        None,
        pytest.approx(grams),
    )
    if unit:
        assert stated_mass(read_line(f"{fraction} {unit} ({weight}) chopped nuts")) == pytest.approx(grams)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("14 cup water", "a lost slash: '14' read as 1/4"),
        ("2 34 cups flour", "a lost slash: '2 34' read as 2 3/4"),
        ("12 cups water", "perhaps a lost slash: '12' may be 1/2"),
        ("12 tbsp butter", "perhaps a lost slash: '12' may be 1/2"),
        ("12 tablespoons (1½ sticks) butter", None),
        ("2 14 oz cans beans", None),
        ("12 eggs", None),
        ("1 1/2 cups flour", None),
    ],
)
def test_lost_slashes_are_decided_by_what_is_plausible_and_noted(text, note):
    assert read_line(text).notes == (() if note is None else (note,))


@pytest.mark.parametrize("text", ["For the sauce:", "or 400 g of beans", "1/2", "---", "", "  "])
def test_lines_that_name_nothing(text):
    assert read_line(text).names == ()
    assert to_ingredient(read_line(text), text) is None


def test_lines_are_read_in_order_and_once(monkeypatch):
    asked = []
    parse = library.parse
    monkeypatch.setattr(library, "parse", lambda text: asked.append(text) or parse(text))
    texts = ["3 purple carrots", "鸡蛋 2个", "3 purple carrots", "3 &nbsp; purple carrots"]
    names = [line.names[0] for line in read_lines(texts)]
    assert names == ["purple carrots", "鸡蛋", "purple carrots", "purple carrots"]
    assert asked == ["3 purple carrots"]
    read_lines(texts)
    assert len(asked) == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "1",
                "2/0",
                "½",
                "g",
                "(",
                ")",
                "80/20",
                "14",
                "cup",
                "each",
                "x",
                "大さじ",
                "salt",
                ":",
                "&amp;",
            ]
        ),
        max_size=8,
    )
)
def test_any_line_gives_a_usable_ingredient_or_none(pieces):
    text = " ".join(pieces)
    found = to_ingredient(read_line(text), text)
    if found is None:
        assert not {"salt"} & set(pieces) or is_heading(text)
    else:
        assert found.name.strip() == found.name != ""
        assert found.mass is None or found.mass >= 0


def test_without_the_parser(monkeypatch):
    monkeypatch.setitem(sys.modules, "ingredient_parser", None)
    library.parser.cache_clear()
    try:
        with pytest.raises(ImportError, match=r"needs ingredient-parser-nlp: pip install 'rode\[data\]'"):
            read_line("a line that no other test reads")
    finally:
        library.parser.cache_clear()


def test_without_the_tagger(monkeypatch):
    def parse(text):
        raise LookupError("Resource averaged_perceptron_tagger_eng not found")

    module = types.SimpleNamespace(parse_ingredient=parse)
    monkeypatch.setitem(sys.modules, "ingredient_parser", module)
    library.parser.cache_clear()
    try:
        with pytest.raises(OSError, match=r"nltk.downloader averaged_perceptron_tagger_eng"):
            read_line("another line that no other test reads")
    finally:
        library.parser.cache_clear()
