"""From the amount of a line to grams, by USDA's household measures. Anything that they do not tell stays unknown."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rode_food.lines.reading import Amount, Line
from rode_food.lines.units import GRAMS, MILLILITRES
from rode_food.lines.words import singular
from rode_food.usda.tables import Food, Portion

_VOLUME_WORDS = {"tablespoon": "tbsp", "teaspoon": "tsp", "liter": "l", "fluid ounce": "fl oz"}
_VOLUME = re.compile(
    r"(?:serving\s+)?(?P<unit>cups?|tbsp|tablespoons?|tsp|teaspoons?|fl oz|fluid ounces?|pints?|quarts?|gallons?|liters?|ml)\b"
    r"[\s,]*(?P<form>.*)$",
    re.I,
)
_WEIGHT = re.compile(r"^(?:oz|lb|g|gram|grams|kg)\b", re.I)
# a measure of something else: what a pound yields, what a mix makes
_NOT_AS_IS = re.compile(r"\byields?\b(?! from 1 (?!lb\b))|\bto make\b|\bprepared\b|\bmakes\b", re.I)
_SIZES = ("extra large", "extra small", "large", "medium", "small", "jumbo", "thick", "thin")
# a line without a size means this; a recipe's egg is large (US), everything else medium
_LARGE_BY_DEFAULT = frozenset({"01123", "01124", "01125"})
# other words for the pieces that the table counts, the nearest first; "" is a whole one
_SAME = {
    "rib": ("rib", "stalk"),
    "stick": ("stick", "stalk"),
    "stalk": ("stalk", ""),
    "root": ("root", ""),
    "head": ("head", ""),
    "bulb": ("bulb", ""),
    "plant": ("plant", ""),
    "piece": ("piece", ""),
    "whole": ("",),
    "each": ("",),
    "unit": ("",),
    "tin": ("can",),
    "segment": ("segment", "wedge"),
    "rasher": ("slice",),
    "strip": ("strip", "slice"),
    "loaf": ("loaf",),
}
_WHOLE = frozenset(("fruit", "item", "bulb", "ear", "bird", "head"))
_WATERY = re.compile(
    r"\b(?:water|juice|broth|stock|vinegar|wine|beer|milk|buttermilk|tea|coffee|bouillon|soymilk|cider)\b",
    re.I,
)


@dataclass(frozen=True)
class Grams:
    """Grams of a line, or why they are unknown.

    Attributes:
        grams: None where they cannot be told.
        how: "weight", a measure of the food ("1 cup, chopped = 160 g"), "density of water"; else the reason.
    """

    grams: float | None
    how: str


def to_grams(line: Line, food: Food | None) -> Grams:
    """Grams that a line means, its range at the middle.

    A weight needs no food. A volume takes one measure of the food for all units, so that 16 tablespoons are a cup:
    of those whose form fits the line ("chopped", "grated") the largest. A count takes the measure of its unit ("clove",
    "slice", "stalk"), or that of a whole one, of the size that the line names: medium where it names none (eggs: large).
    Millilitres of a watery drink, broth, juice, vinegar or milk without a measure of volume weigh 1 g each (within 5 %).
    """
    amounts = line.amounts
    if not amounts:
        return Grams(None, "no amount")
    for amount in amounts:
        if amount.unit in GRAMS:
            return Grams(amount.middle * GRAMS[amount.unit] * _containers(amount, amounts), "weight")
    if food is None:
        return Grams(None, "no food for its measure")
    for amount in amounts:
        if amount.unit in MILLILITRES:
            found = _by_volume(amount.middle * MILLILITRES[amount.unit], line.words, food)
            if found is not None:
                millilitres, how = found
                return Grams(millilitres * _containers(amount, amounts), how)
    reasons = []
    for amount in amounts:
        if amount.unit in MILLILITRES:
            reasons.append("no measure of volume")
            continue
        portion = _piece(amount.unit, line.words, food)
        if portion is not None:
            return Grams(amount.middle * portion.grams / portion.amount, _show(portion))
        reasons.append(f"no measure for {amount.unit!r}" if amount.unit else "no measure of a whole one")
    return Grams(None, reasons[0])


def _containers(amount: Amount, amounts: Sequence[Amount]) -> float:
    """How many containers of that amount each: 2 for "2 (6 oz) cans", else 1."""
    if not amount.each:
        return 1.0
    others = [
        a.middle for a in amounts if a is not amount and a.unit not in GRAMS and a.unit not in MILLILITRES
    ]
    return others[0] if others else 1.0


def _show(portion: Portion) -> str:
    return f"{portion.amount:g} {portion.measure} = {portion.grams:g} g"


def _tokens(text: str) -> frozenset[str]:
    return frozenset(singular(word) for word in re.findall(r"[a-z]+", text.lower()))


@dataclass(frozen=True)
class _Volume:
    millilitres: float
    form: frozenset[str]
    portion: Portion


@functools.lru_cache(maxsize=20_000)
def _volumes(food: Food) -> tuple[_Volume, ...]:
    found = []
    for portion in food.portions:
        match = _VOLUME.match(portion.measure)
        if match is None or _NOT_AS_IS.search(portion.measure):
            continue
        unit = singular(match["unit"].lower())
        unit = _VOLUME_WORDS.get(unit, unit)
        form = _tokens(re.sub(r"\([^)]*\)", "", match["form"]))
        found.append(_Volume(portion.amount * MILLILITRES[unit], form, portion))
    return tuple(found)


def _by_volume(millilitres: float, words: str, food: Food) -> tuple[float, str] | None:
    volumes = _volumes(food)
    if not volumes:
        watery = food.group == "Beverages" or _WATERY.search(food.description)
        if watery and food.fat + food.protein + food.carb < 15:
            return millilitres, "density of water"
        return None
    line = _tokens(words)
    # the form that shares most with the line, then the one that says least else, then the table's order; of one form
    # the largest measure, which is rounded least
    best = min(
        range(len(volumes)), key=lambda i: (-len(volumes[i].form & line), len(volumes[i].form - line), i)
    )
    same = [v for v in volumes if v.form == volumes[best].form]
    chosen = max(same, key=lambda v: v.millilitres)
    return millilitres * chosen.portion.grams / chosen.millilitres, _show(chosen.portion)


def _size(text: str) -> str:
    return next((size for size in _SIZES if re.search(rf"\b{size}\b", text, re.I)), "")


@dataclass(frozen=True)
class _Piece:
    noun: str  # "clove", "slice", "" for a bare size
    size: str
    words: frozenset[str]
    portion: Portion


@functools.lru_cache(maxsize=20_000)
def _pieces(food: Food) -> tuple[_Piece, ...]:
    found = []
    for portion in food.portions:
        measure = portion.measure
        if _VOLUME.match(measure) or _WEIGHT.match(measure) or _NOT_AS_IS.search(measure):
            continue
        head = re.sub(r"\([^)]*\)?", "", measure)
        words = [singular(word) for word in re.findall(r"[a-z]+", head.lower())]
        nouns = [
            word
            for word in words
            if word not in ("extra", "large", "medium", "small", "jumbo", "thick", "thin")
        ]
        noun = nouns[0] if nouns else ""
        noun = "" if noun in ("whole", "without", "with", "each", "refuse") else noun
        found.append(_Piece(noun, _size(head), frozenset(words), portion))
    return tuple(found)


def _piece(unit: str, words: str, food: Food) -> Portion | None:
    wanted = unit.split()[-1] if unit else ""
    for noun in _SAME.get(wanted, (wanted,)):
        fitting = _whole(words, food) if not noun else [p for p in _pieces(food) if p.noun == noun]
        if fitting:
            break
    else:
        return None
    named = _size(words)
    size = named or ("large" if food.id in _LARGE_BY_DEFAULT else "medium")
    line = _tokens(words)
    best = min(fitting, key=lambda p: (p.size != size, bool(p.size), -len(p.words & line)))
    # a size that the line names and the table lacks is unknown, unless the table knows one size only
    return None if named and best.size and best.size != size else best.portion


def _whole(words: str, food: Food) -> list[_Piece]:
    """Measures of a whole one: the food's own name ("pepper", "Italian tomato"), a bare size, "fruit"."""
    pieces = _pieces(food)
    spoken = re.findall(r"[a-z]+", words.lower())
    line = _tokens(words) | {singular(a + b) for a, b in itertools.pairwise(spoken)}  # "sweetpotato"
    named = [p for p in pieces if p.noun in line and p.words - {p.size} <= line | _tokens(food.description)]
    return named or [p for p in pieces if not p.noun] or [p for p in pieces if p.noun in _WHOLE]
