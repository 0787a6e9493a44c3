"""Units of weight and volume, and every unit's name in one form."""

from __future__ import annotations

from rode_food.lines.words import singular

GRAMS = {"mg": 0.001, "g": 1.0, "kg": 1000.0, "oz": 28.349523125, "lb": 453.59237}
CUP = 236.5882365
"""Millilitres of a US cup: 16 tablespoons, 48 teaspoons, 8 fluid ounces."""
MILLILITRES = {
    "ml": 1.0,
    "cc": 1.0,
    "cl": 10.0,
    "dl": 100.0,
    "l": 1000.0,
    "cup": CUP,
    "tbsp": CUP / 16,
    "tsp": CUP / 48,
    "fl oz": CUP / 8,
    "pint": 2 * CUP,
    "quart": 4 * CUP,
    "gallon": 16 * CUP,
    # kitchen conventions; they matter for salt and spices only
    "dash": CUP / 48 / 8,
    "pinch": CUP / 48 / 16,
    "drop": 0.05,
}

_WORDS = {
    "gram": "g",
    "gr": "g",
    "gm": "g",
    "kilogram": "kg",
    "kilo": "kg",
    "milligram": "mg",
    "ounce": "oz",
    "pound": "lb",
    "lbs": "lb",
    "milliliter": "ml",
    "millilitre": "ml",
    "centiliter": "cl",
    "deciliter": "dl",
    "liter": "l",
    "litre": "l",
    "teaspoon": "tsp",
    "tablespoon": "tbsp",
    "tb": "tbsp",
    "table spoon": "tbsp",
    "tea spoon": "tsp",
    "tbs": "tbsp",
    "fluid ounce": "fl oz",
    "us liquid pint": "pint",
}


def unit_name(unit: str) -> str:
    """A unit in one form: "Tbsps" -> "tbsp", "fluid_ounce" -> "fl oz", "cloves" -> "clove"."""
    words = unit.lower().replace("_", " ").replace(".", "").split()
    # "small pinches" is a pinch, "large cloves" a clove
    if len(words) > 1 and words[0] in (
        "small",
        "medium",
        "large",
        "heaping",
        "heaped",
        "level",
        "scant",
        "metric",
    ):
        words = words[1:]
    name = " ".join(singular(word) for word in words)
    return _WORDS.get(name, name)
