"""The nutrition answer: written in one fixed form, read from many."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rode_food.records import NUTRITION_FIELDS

_WRITTEN = {
    "mass": ("mass", "g"),
    "energy": ("energy", "kcal"),
    "fat": ("fat", "g"),
    "protein": ("protein", "g"),
    "carb": ("carbohydrate", "g"),
}
_GRAMS = {"mg": 0.001, "g": 1.0, "kg": 1000.0, "oz": 28.349523125, "lb": 453.59237}
# a "calorie" on a food label is a kilocalorie
_KILOCALORIES = {"kcal": 1.0, "cal": 1.0, "kj": 1 / 4.184}
_UNIT_WORDS = (
    (r"kcals?|kilo-?calories?|kilocals?", "kcal"),
    (r"calories|calorie|cals?", "cal"),
    (r"kj|kilo-?joules?", "kj"),
    (r"mg|milligrams?", "mg"),
    (r"kg|kilograms?|kilos?", "kg"),
    (r"g|gr|grams?|grammes?", "g"),
    (r"oz|ounces?", "oz"),
    (r"lbs?|pounds?", "lb"),
)
_LABELS = (
    ("carb", r"carbohydrates?|carbs?"),
    ("protein", r"proteins?"),
    # "saturated fat" is a part of the fat, and "fat-free" is none of it
    ("fat", r"(?<!saturated )(?<!trans )fats?(?!-free)"),
    ("energy", r"energy|kilo-?calories?|kcals?|calories?|calorific value"),
    ("mass", r"mass|weighs?|weight|weighing"),
)
_UNIT = "|".join(f"(?P<u{i}>{words})" for i, (words, _) in enumerate(_UNIT_WORDS))
_NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+,\d{1,2}(?!\d)|\d+(?:\.\d+)?|\.\d+"
_QUANTITY = (
    rf"(?<![\w.,])(?P<low>{_NUMBER})(?:\s*(?:-|–|to)\s*(?P<high>{_NUMBER}))?(?!\d|\s*%)\s*(?:(?:{_UNIT})\b)?"
)
_LABEL = "|".join(rf"(?P<{name}>\b(?:{words})\b)" for name, words in _LABELS)
_TOKEN = re.compile(f"(?:{_QUANTITY})|(?:{_LABEL})", re.IGNORECASE)


def format_nutrition(values: Mapping[str, float]) -> str:
    """ "mass 320 g, energy 410 kcal, fat 12 g, protein 18 g, carbohydrate 55 g".

    Whole numbers from 10 on, one decimal below: as much as a picture can tell, in few tokens.
    """
    return ", ".join(f"{word} {_short(values[name])} {unit}" for name, (word, unit) in _WRITTEN.items())


def _short(value: float) -> str:
    rounded = round(value, 1)
    return str(round(value)) if rounded >= 10 or rounded == int(rounded) else f"{rounded:.1f}"


@dataclass(frozen=True)
class _Token:
    start: int
    end: int
    field: str | None  # a label's field, None for a quantity
    value: float = 0.0
    unit: str | None = None


def parse_nutrition(text: str) -> dict[str, float | None] | None:
    """Finds the five numbers in free text, whatever their order and units.

    Each label ("fat", "carbs", "weighs", ...) is joined with the quantity right before or after it, with no
    comma between; the leftmost join wins, so that "fat 12 g" and "12 g of fat" both work. kJ, mg, kg, oz and
    lb are converted, a range counts as its middle, a percentage as nothing, and a quantity in kcal or kJ
    needs no label.

    Returns:
        All of `NUTRITION_FIELDS` in g and kcal, None where one was not found; None if none was.
    """
    tokens = [token for match in _TOKEN.finditer(text) if (token := _token(match)) is not None]
    found: dict[str, float] = {}
    used: set[int] = set()
    pairs = []
    for i, (left, right) in enumerate(itertools.pairwise(tokens)):
        label, quantity = (left, right) if left.field is not None else (right, left)
        between = text[left.end : right.start]
        if label.field is None or quantity.field is not None or re.search(r"[,;]|\.\s", between):
            continue
        value = _in_unit_of(label.field, quantity)
        if value is not None:
            pairs.append(("\n" in between, i, label.field, value))
    for _, i, name, value in sorted(pairs):
        if i in used or i + 1 in used or name in found:
            continue
        used |= {i, i + 1}
        found[name] = value
    if "energy" not in found:
        for token in tokens:
            if token.field is None and token.unit in _KILOCALORIES:
                found["energy"] = token.value * _KILOCALORIES[token.unit]
                break
    return {name: found.get(name) for name in NUTRITION_FIELDS} if found else None


def _token(match: re.Match[str]) -> _Token | None:
    for name, _ in _LABELS:
        if match[name]:
            return _Token(match.start(), match.end(), name)
    numbers = [_float(match[key]) for key in ("low", "high") if match[key]]
    value = sum(numbers) / len(numbers)
    if not math.isfinite(value):
        return None
    unit = next((unit for i, (_, unit) in enumerate(_UNIT_WORDS) if match[f"u{i}"]), None)
    return _Token(match.start(), match.end(), None, value, unit)


def _float(text: str) -> float:
    if re.fullmatch(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?", text):
        return float(text.replace(",", ""))
    return float(text.replace(",", "."))


def _in_unit_of(name: str, quantity: _Token) -> float | None:
    """The quantity in the field's unit; None if its unit cannot be one of that field."""
    units = _KILOCALORIES if name == "energy" else _GRAMS
    if quantity.unit is None:
        return quantity.value
    return quantity.value * units[quantity.unit] if quantity.unit in units else None
