"""Can an answer be believed? Every number is checked on its own, against the others, and against the recipe's line."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rode_food.lines.apply import read_ingredient
from rode_food.records import Ingredient, Nutrition, Quantity
from rode_food.unifood.label.prompt import NUMBERS, ingredient_line
from rode_food.unifood.label.settings import LabelSettings

KILOJOULES = 4.184

# kcal per gram of food beyond those of fat, protein and carbohydrate: alcohol (7 kcal per gram of it), acetic acid.
# The share of alcohol is the strongest sold under the name, so these bounds only ever allow more.
_BEYOND = tuple(
    (re.compile(rf"\b(?:{words})\b"), kcal)
    for words, kcal in (
        (r"vinegars?", 0.3),
        (r"beers?|ale|lager|stout|porter|pilsner|ciders?|malt (?:liquor|beverage)|hard seltzer", 0.7),
        (
            r"wines?|sake|sherry|port|marsala|madeira|vermouth|champagne|prosecco|cava|mirin|shaoxing|sangria|soju|"
            r"burgundy|chardonnay|merlot|cabernet|pinot|riesling|sauvignon|claret|lillet|makgeolli",
            1.5,
        ),
        (r"daiquiri|margarita|pina colada|tequila sunrise", 2.0),
        (
            r"rums?|vodkas?|gin|whiske?ys?|bourbon|scotch|tequila|mezcal|brandy|brandies|cognac|armagnac|calvados|grappa|"
            r"pisco|cachaca|cachaça|kirsch|kirschwasser|schnapps|absinthe|aquavit|baijiu|spirits?|liqueurs?|liquors?|"
            r"amaretto|kahlua|kahlúa|baileys|cointreau|triple sec|grand marnier|limoncello|curacao|curaçao|ouzo|pastis|"
            r"pernod|campari|aperol|sambuca|galliano|chartreuse|drambuie|frangelico|chambord|cassis|creme de \w+|"
            r"crème de \w+|everclear|moonshine|alcohol",
            4.0,
        ),
        (r"extracts?|bitters|essences?|vanilla$", 3.0),
    )
)
# carbohydrate that gives little or no energy, whatever the table of contents says (of baking powder it is a remainder)
_GIVES_LITTLE = re.compile(
    r"\b(?:sweeteners?|stevia|erythritol|xylitol|sorbitol|maltitol|isomalt|allulose|monk ?fruit|sucralose|saccharin|"
    r"aspartame|splenda|truvia|swerve|sugar[- ]free|no[- ]sugar|low[- ]calorie|reduced[- ]calorie|"
    r"baking powder)\b"
)
_FIBRE = re.compile(r"\b(?:fibre|fiber)\b")
_UNITS = {"g": "g", "mg": "mg", "ug": "ug", "µg": "ug", "μg": "ug", "mcg": "ug", "iu": "IU"}
_GRAMS = {"g": 1.0, "mg": 1e-3, "ug": 1e-6}
_FENCE = re.compile(r"\A```(?:json)?\s*\n(?P<inside>.*)\n\s*```\Z", re.S)


@dataclass(frozen=True)
class Problem:
    """Why an answer cannot be used.

    Attributes:
        reason: one of a few words, to count by: "kilojoules", "missing ingredient", ...
        detail: what exactly, in words that the model is sent as well.
    """

    reason: str
    detail: str


class _Bad(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.problem = Problem(reason, detail)


def stated_grams(ingredient: Ingredient) -> float | None:
    """Grams that the ingredient's line states ("150 g", "1 lb", "2 (6 oz) cans"); None for "1 cup"."""
    parsed = read_ingredient(ingredient_line(ingredient))
    return None if parsed is None else parsed.mass


def energy_bounds(nutrition: Nutrition, words: str, settings: LabelSettings) -> tuple[float, float]:
    """The least and the most kcal that can be believed, by Atwater's 4/9/4 kcal per gram of protein, fat and carbohydrate.

    Args:
        nutrition: mass and the three in grams; fibre among the micronutrients, if it was given, may count as 0 to 4.
        words: the ingredient's name and line, for what gives energy beyond the three (alcohol) or less (sweeteners).
        settings: the shares; `energy_slack` comes on top.
    """
    atwater = 4 * (nutrition.protein or 0) + 9 * (nutrition.fat or 0) + 4 * (nutrition.carb or 0)
    words = words.lower()
    fibre = sum(
        quantity.value * _GRAMS.get(quantity.unit, 0.0)
        for name, quantity in nutrition.micronutrients.items()
        if _FIBRE.search(name.lower())
    )
    least = atwater - 4 * min(fibre, nutrition.carb or 0)
    if _GIVES_LITTLE.search(words):
        least = 4 * (nutrition.protein or 0) + 9 * (nutrition.fat or 0)
    beyond = max((kcal for pattern, kcal in _BEYOND if pattern.search(words)), default=0.0)
    return (
        least * (1 - settings.energy_under),
        atwater * (1 + settings.energy_over) + beyond * (nutrition.mass or 0),
    )


def check_answer(
    text: str, ingredients: Sequence[Ingredient], settings: LabelSettings
) -> tuple[list[Nutrition], list[Problem]]:
    """Reads an answer and checks it.

    Args:
        text: what the model wrote: one JSON object, at most in a fenced block.
        ingredients: what it was asked about, in order.
        settings: the tolerances.

    Returns:
        The nutrition of each ingredient, in order, and no problem; or what is wrong, with the list of no use.
    """
    try:
        entries = _entries(text)
    except _Bad as bad:
        return [], [bad.problem]
    problems: list[Problem] = []
    found: dict[int, Nutrition] = {}
    seen: set[int] = set()
    for entry in entries:
        try:
            number = _number_of(entry, len(ingredients), seen)
            seen.add(number)
            found[number] = _nutrition(entry, number)
        except _Bad as bad:
            problems.append(bad.problem)
    missing = [number for number in range(1, len(ingredients) + 1) if number not in seen]
    if missing:
        listed = ", ".join(map(str, missing))
        problems.append(Problem("missing ingredient", f"no entry for ingredient {listed}"))
    for number, nutrition in sorted(found.items()):
        problems += _implausible(number, nutrition, ingredients[number - 1], settings)
    if not problems and not sum(nutrition.mass or 0 for nutrition in found.values()):
        problems.append(Problem("no mass", "all masses are 0"))
    # one ingredient in kilojoules mostly means all of them, small ones that pass unseen too
    problems.sort(key=lambda problem: problem.reason != "kilojoules")
    return [found[number] for number in sorted(found)], problems


def _entries(text: str) -> list[Any]:
    text = text.strip()
    fenced = _FENCE.match(text)
    try:
        answer = json.loads(fenced["inside"] if fenced else text, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise _Bad("not JSON", f"not one JSON object ({error})" if text else "empty answer") from None
    entries = answer.get("ingredients") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        raise _Bad("wrong form", 'expected an object with a list "ingredients"')
    return entries


def _not_finite(name: str) -> float:
    raise _Bad("not finite", f"{name} is not a number")


def _number_of(entry: object, count: int, seen: set[int]) -> int:
    number = entry.get("number") if isinstance(entry, dict) else None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number != number // 1:
        raise _Bad("wrong form", f"number: expected the ingredient's number, got {_show(number)}")
    if not 1 <= number <= count:
        raise _Bad("unknown ingredient", f"ingredient {number:g}: the list ends at {count}")
    if number in seen:
        raise _Bad("duplicate ingredient", f"ingredient {number:g}: more than one entry")
    return int(number)


def _show(value: object) -> str:
    return json.dumps(value)[:40]


def _quantity(value: object, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _Bad("wrong form", f"{where}: expected a number, got {_show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _Bad("not finite", f"{where}: not a finite number")
    if number < 0:
        raise _Bad("negative", f"{where}: {number:g} is negative")
    return number


def _nutrition(entry: dict[str, Any], number: int) -> Nutrition:
    where = f"ingredient {number}"
    values = {field: _quantity(entry.get(name), f"{where}: {name}") for field, name in NUMBERS.items()}
    listed = entry.get("micronutrients") or []
    if not isinstance(listed, list):
        raise _Bad("wrong form", f"{where}: micronutrients: expected a list")
    micronutrients: dict[str, Quantity] = {}
    for micro in listed:
        name = micro.get("name") if isinstance(micro, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise _Bad(
                "wrong form", f"{where}: micronutrients: expected name, value and unit, got {_show(micro)}"
            )
        name = " ".join(name.split())
        at = f"{where}: {name}"
        unit = _UNITS.get(str(micro.get("unit")).strip().lower())
        if unit is None:
            raise _Bad("unknown unit", f"{at}: unit {_show(micro.get('unit'))} is none of g, mg, ug, IU")
        if name.lower() in (known.lower() for known in micronutrients):
            raise _Bad("duplicate micronutrient", f"{at}: more than one value")
        value = _quantity(micro.get("value"), at)
        if value * _GRAMS.get(unit, 0.0) > values["mass"] * 1.001 + 1e-3:
            raise _Bad(
                "exceeds the mass", f"{at}: {value:g} {unit} is more than the mass, {values['mass']:g} g"
            )
        micronutrients[name] = Quantity(value, unit)
    return Nutrition(**values, micronutrients=micronutrients)


def _implausible(
    number: int, nutrition: Nutrition, ingredient: Ingredient, settings: LabelSettings
) -> list[Problem]:
    where = f"ingredient {number} ({ingredient.name})"
    mass, energy = nutrition.mass or 0.0, nutrition.energy or 0.0
    problems = []
    parts = (nutrition.fat or 0) + (nutrition.protein or 0) + (nutrition.carb or 0)
    if parts > mass * (1 + settings.mass_slack) + 1.0:
        told = f"{where}: fat, protein and carbohydrate are {parts:g} g, more than the mass, {mass:g} g"
        problems.append(Problem("exceeds the mass", told))
    words = f"{ingredient.name} {ingredient_line(ingredient)}"
    low, high = energy_bounds(nutrition, words, settings)
    slack = settings.energy_slack
    if not low - slack <= energy <= high + slack:
        told = f"{where}: energy {energy:g} kcal does not fit fat, protein and carbohydrate ({low:.0f} to {high:.0f} kcal)"
        if low <= energy / KILOJOULES <= high:
            problems.append(Problem("kilojoules", f"{told}; it looks like kilojoules, give kilocalories"))
        else:
            problems.append(Problem("energy does not fit", told))
    stated = stated_grams(ingredient)
    if stated is not None and abs(mass - stated) > settings.stated_mass_tolerance * stated + 5.0:
        told = f"{where}: mass {mass:g} g, but its line states {stated:g} g"
        problems.append(Problem("not the stated mass", told))
    return problems
