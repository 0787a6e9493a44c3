"""The nutrition answer: written in one fixed form, read from many."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from rode_food.nutrition_json import find_pairs
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
    (r"calories(?!\s+from)|calorie|cals?", "cal"),
    (r"kj|kilo-?joules?", "kj"),
    (r"mg|milligrams?", "mg"),
    (r"kg|kilograms?|kilos?", "kg"),
    (r"g|gr|grams?|grammes?", "g"),
    (r"oz|ounces?", "oz"),
    (r"lbs?|pounds?", "lb"),
)
_ANY_UNIT = "|".join(words for words, _ in _UNIT_WORDS)
_OTHER = "other"
_LABELS = (
    # parts of the five and what else a label lists: they take their number with them
    (
        _OTHER,
        r"calories\s+from\s+fat|(?:saturated|trans|unsaturated|poly-?unsaturated|mono-?unsaturated|sat\.?)\s+fats?|"
        r"fat\s+calories|saturates|sugars?|(?:dietary\s+)?fib(?:er|re)|starch|sodium|salt|cholesterol|potassium|calcium|iron|"
        r"vitamin\s+\w+|alcohol",
    ),
    # "low-fat yogurt" and "high-protein bar" are names of food
    (
        "",
        r"(?:low|full|reduced|non|half|high|zero|no|less|lower|extra)[-\s]+(?:fat|carb|carbohydrate|protein|calorie|energy)s?(?=[-\s]+[a-z])|"
        r"(?:fat|carb|calorie|sugar)[-\s]free|(?:protein|energy)\s+(?:bars?|shakes?|powders?|drinks?)|"
        r"(?:low|full|reduced|non|half|zero|no|high)-(?:fat|carb|protein|calorie)s?",
    ),
    ("carb", r"carbohydrates?|carbs?|cho"),
    ("protein", r"proteins?"),
    ("fat", r"fats?"),
    ("energy", r"energy|kilo-?calories?|kcals?|calories?|calorific value|energetic value|kj|kilo-?joules?"),
    ("mass", r"mass|weighs?|weight|weighing|serving size|portion size"),
)
_UNIT = "|".join(f"(?P<u{i}>{words})" for i, (words, _) in enumerate(_UNIT_WORDS))
_AFTER = rf"(?=\s*(?:(?:{_ANY_UNIT})\b|[,;.)|\n-]|$))"
_THOUSANDS = (
    rf"[1-9]\d{{0,2}}(?:[ '\u2019]\d{{3}})+(?:[.,]\d+)?(?!\d){_AFTER}"  # "1 200 g"; not "250 200 g fat"
)
_NUMBER = (
    rf"{_THOUSANDS}|[1-9]\d{{0,2}}(?:,\d{{3}})+(?:\.\d+)?(?!\d)|[1-9]\d{{0,2}}(?:\.\d{{3}})+,\d+|"
    r"[1-9]\d{0,2}(?:\.\d{3}){2,}(?!\d)|\d+,\d+(?!,?\d)|\d+(?:\.\d+)?e[+-]?\d{1,3}(?![\w.])|\d+(?:\.\d+)?|\.\d+"
)
_QUANTITY = (
    rf"(?P<minus>(?<![\w.,)%~–—-])[-−](?=[\d.]))?(?<![\w.,])(?P<low>{_NUMBER})(?:\s*(?:{_ANY_UNIT})?\s*(?:-|–|—|~|\bto\b|\band\b(?=\s*\d))\s*(?P<high>{_NUMBER}))?"
    rf"(?!\d|\s*%|e\d)(?:\s*(?:±|\+/-)\s*[\d.,]+)?[^\S\n]*(?:(?:{_UNIT})\b)?"
)
_LABEL = "|".join(rf"(?P<l{i}>\b(?:{words})\b)" for i, (_, words) in enumerate(_LABELS))
# "fat (g): 12" and "fat g: 12" have the unit at the label
_TOKEN = re.compile(
    rf"(?:{_QUANTITY})|(?:{_LABEL})(?:\s*[(\[]\s*(?:in\s+)?(?P<bracket>{_ANY_UNIT})\s*[)\]]|\s+(?:in\s+)?(?P<bare>{_ANY_UNIT})(?=\s*[:=|]))?",
    re.IGNORECASE,
)
# numbers of other things: cups, servings
_COUNTED = re.compile(
    r"\s*(?:cups?|tbsp|tsp|tablespoons?|teaspoons?|servings?|slices?|pieces?|bowls?|plates?|portions?|eggs?)\b",
    re.I,
)
_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.I | re.S)


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
    unit: str | None = None  # of a label: that of the number beside it


def parse_nutrition(text: str) -> dict[str, float | None] | None:
    """Finds the five numbers in free text or JSON, whatever their order, units and number format.

    JSON counts first. In text each label ("fat", "carbs", "weighs", ...) is joined with the quantity right before or after
    it, with no comma between; the leftmost join wins, so that "fat 12 g" and "12 g of fat" both work. kJ, mg, kg, oz and lb
    are converted, a range counts as its middle, a percentage as nothing. A quantity in kcal or kJ needs no label, and the
    first weight that belongs to nothing else is the mass. "low-fat" is no label, and "saturated fat" and "calories from fat"
    are none of the five. What a model thinks aloud (`<think>...</think>`) is not read.

    Returns:
        All of `NUTRITION_FIELDS` in g and kcal, None where one was not found; None if none was.
    """
    text = _answer_of(text)
    found = {name: value for name, value in (_from_json(text) or _from_text(text)).items() if value >= 0}
    return {name: found.get(name) for name in NUTRITION_FIELDS} if found else None


def _answer_of(text: str) -> str:
    rest = _THINKING.sub(" ", re.sub(r"[\u00a0\u202f\u2009]", " ", text))
    closed = re.split(r"</(?:think|thinking|reasoning)>", rest, flags=re.I)[
        -1
    ]  # the opening mark is often in the prompt
    return re.split(r"<(?:think|thinking|reasoning)>", closed, flags=re.I)[0]


def _from_json(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in find_pairs(text):
        label = _tokens(f"{key}: x")
        numbers = [token for token in _tokens(value) if token.field is None]
        if not numbers or not label or not label[0].field or label[0].field == _OTHER:
            continue
        number = _in_unit_of(label[0].field, numbers[0], label[0].unit)
        if number is not None:
            found.setdefault(label[0].field, number)
    return found


def _from_text(text: str) -> dict[str, float]:
    # signs of tables, emphasis and broken JSON say nothing
    text = re.sub(r"[_*\"`{}|\u201c\u201d]", " ", text)
    tokens = _tokens(text)
    found: dict[str, float] = {}
    used: set[int] = set()
    pairs = []
    misfits: set[int] = set()  # "energy 12 g" is neither
    for i, (left, right) in enumerate(itertools.pairwise(tokens)):
        label, quantity = (left, right) if left.field is not None else (right, left)
        between = text[left.end : right.start]
        if label.field is None or quantity.field is not None or re.search(r"[,;]|\.\s", between):
            continue
        value = quantity.value if label.field == _OTHER else _in_unit_of(label.field, quantity, label.unit)
        if value is not None:
            pairs.append(("\n" in between, i, label.field, value))
        elif label is left:
            misfits.add(i + 1)
    for _, i, name, value in sorted(pairs):
        if i in used or i + 1 in used or name in found:
            continue
        used |= {i, i + 1}
        if name != _OTHER:
            found[name] = value
    free = [token for i, token in enumerate(tokens) if token.field is None and i not in used]
    if "energy" not in found:
        named = next((token for token in free if token.unit in _KILOCALORIES), None)
        if named is not None and named.unit is not None:
            found["energy"] = named.value * _KILOCALORIES[named.unit]
    if found and "mass" not in found:
        for token in (t for i, t in enumerate(tokens) if t in free and i not in misfits):
            if (
                token.unit in _GRAMS
                and token.value >= 0
                and not re.search(r"(?:\bper|/)\s*$", text[: token.start], re.I)
            ):
                found["mass"] = token.value * _GRAMS[token.unit]
                break
    return found


def _tokens(text: str) -> list[_Token]:
    tokens = []
    for match in _TOKEN.finditer(text):
        token = _token(match)
        if token is not None and not (
            token.field is None and token.unit is None and _COUNTED.match(text, token.end)
        ):
            tokens.append(token)
    return tokens


def _token(match: re.Match[str]) -> _Token | None:
    for i, (name, _) in enumerate(_LABELS):
        if match[f"l{i}"]:
            unit = match["bracket"] or match["bare"] or (match[0] if name == "energy" else None)
            return _Token(match.start(), match.end(), name, unit=_unit(unit)) if name else None
    numbers = [_float(match[key]) for key in ("low", "high") if match[key]]
    value = -numbers[0] if match["minus"] else sum(numbers) / len(numbers)
    if not math.isfinite(value):
        return None
    unit = next((unit for i, (_, unit) in enumerate(_UNIT_WORDS) if match[f"u{i}"]), None)
    return _Token(match.start(), match.end(), None, value, unit)


def _unit(word: str | None) -> str | None:
    if word is None:
        return None
    return next((unit for words, unit in _UNIT_WORDS if re.fullmatch(words, word, re.I)), None)


def _float(text: str) -> float:
    text = re.sub(r"[ '\u2019]", "", text)
    if re.fullmatch(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?", text):
        return float(text.replace(",", ""))
    if re.fullmatch(r"[1-9]\d{0,2}(?:\.\d{3})+,\d+|[1-9]\d{0,2}(?:\.\d{3}){2,}", text):
        return float(text.replace(".", "").replace(",", "."))
    return float(text.replace(",", "."))


def _in_unit_of(name: str, quantity: _Token, label_unit: str | None = None) -> float | None:
    """The quantity in the field's unit; None if its unit cannot be one of that field."""
    units = _KILOCALORIES if name == "energy" else _GRAMS
    unit = quantity.unit or label_unit
    if unit is None:
        return quantity.value
    return quantity.value * units[unit] if unit in units else None
