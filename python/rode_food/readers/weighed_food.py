"""Weighed portions, photographed many times: `photos.json` (a list of objects) beside `images/`.

The splits are made here, and by object: photographs of one object are nearly alike, so that a split by photograph would ask
about what was seen.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from rode_food.look_up import look_up
from rode_food.readers.common import Broken, number_of, safe_path, shown, text_of, unique
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.records import NUTRITION_FIELDS, FoodRecord, Ingredient, Nutrition
from rode_food.tasks import stable_hash
from rode_food.usda.tables import Food, load_foods

KEYS = ("id", "image", "object", "foods")
TEST, VAL = 5, 10
"""One unit of so many goes to test, and to val; see `splits_of`."""


class Weighed(NamedTuple):
    """One food of a portion. Two portions with an equal one hold the same thing: it was weighed once."""

    food: str
    grams: float
    volume: float | None


class Choice(NamedTuple):
    """A row of weighed_food.csv: the SR28 food whose values stand for a food, and why."""

    food: str
    ndb_no: str
    description: str
    reason: str


@cache
def choices() -> dict[str, Choice]:
    """Food -> the SR28 food chosen for it by hand."""
    text = (resources.files("rode_food.readers") / "weighed_food.csv").read_text(encoding="utf-8")
    return {row["food"]: Choice(**row) for row in csv.DictReader(text.splitlines())}


def read(source: Path, log: ReadLog, usda: str = "") -> Iterator[FoodRecord]:
    """Reads `source/photos.json`, twice: first for the objects, whose splits are made by `splits_of`.

    A record is a photograph; its id is OBJECT/PHOTOGRAPH. Its nutrition is that of the portion as weighed, peel, stone and
    shell included: grams times what SR28 states for 100 g of the edible part of the food in weighed_food.csv.

    Args:
        source: the data's folder.
        log: is told what is left out.
        usda: folder of USDA's tables (`rode_food.usda.load_foods`); "" for `usda/` beside the source. Without one only the
            mass is known, which is noted.

    Raises:
        RecordError: the file holds no JSON array; a broken entry, if `log.strict`.
        UsdaError: tables that were named and are not there, or cannot be read.
    """
    path = source / "photos.json"
    foods = _foods(source, usda)
    if foods is None:
        log.note("no USDA tables: mass is the only value", detail="name their folder with --usda")
    splits = splits_of(_objects(path))
    first: dict[str, tuple[Weighed, ...]] = {}
    for entry in unique(read_json_array(path, log, keys=KEYS), path, log):
        try:
            portion, parts = _portion(entry.value)
            if first.setdefault(portion, parts) != parts:
                raise Broken("foods other than its object's", portion)
            record = _record(source, entry.value, portion, parts, foods)
        except Broken as error:
            log.leave_out_broken(error.reason, file=path, line=entry.line, detail=error.detail)
            continue
        if foods is not None and record.nutrition is not None and not record.nutrition.complete:
            log.note("a food without values", file=path, line=entry.line, detail=record.id)
        yield FoodRecord(**{**vars(record), "split": splits[portion]})


def splits_of(objects: Mapping[str, tuple[Weighed, ...]]) -> dict[str, str]:
    """The split of each object. It depends on the objects alone, not on their order.

    A mix and the portions of which it was put together (equal in food, grams and volume) are one unit, so that nothing held
    out was weighed for training too. Units are ordered by a hash of their first name, separately for each food and for
    units with a mix. The first fifth of three units or more is "test", the next tenth of four or more is "val", both
    rounded up. A food with one or two units is for training.
    """
    strata: dict[str, list[list[str]]] = {}
    for unit in _units(objects):
        mixed = next((name for name in unit if len(objects[name]) > 1), None)
        strata.setdefault("" if mixed else objects[unit[0]][0].food, []).append(unit)
    found: dict[str, str] = {}
    for units in strata.values():
        units.sort(key=lambda unit: stable_hash("weighed food", unit[0]))
        test = math.ceil(len(units) / TEST) if len(units) >= 3 else 0
        val = math.ceil(len(units) / VAL) if len(units) >= 4 else 0
        for place, unit in enumerate(units):
            split = "test" if place < test else "val" if place < test + val else "train"
            found.update(dict.fromkeys(unit, split))
    return found


def _units(objects: Mapping[str, tuple[Weighed, ...]]) -> list[list[str]]:
    """Objects that share a weighed thing, together; the names in each are sorted."""
    unit_of = {name: [name] for name in objects}
    holders: dict[Weighed, str] = {}
    for name in sorted(objects):
        for part in objects[name]:
            other, own = unit_of[holders.setdefault(part, name)], unit_of[name]
            # Two portions of one food may weigh the same by chance: only a mix joins.
            if other is own or max(len(objects[n]) for n in (*other, *own)) == 1:
                continue
            other += own
            unit_of.update(dict.fromkeys(own, other))
    return [sorted(unit) for unit in {id(unit): unit for unit in unit_of.values()}.values()]


def _objects(path: Path) -> dict[str, tuple[Weighed, ...]]:
    found: dict[str, tuple[Weighed, ...]] = {}
    for entry in read_json_array(path, ReadLog(), keys=KEYS):  # what is broken is told at the second reading
        try:
            found.setdefault(*_portion(entry.value))
        except Broken:
            continue
    return found


def _portion(entry: dict[str, Any]) -> tuple[str, tuple[Weighed, ...]]:
    portion = text_of(entry.get("object"), "an object")
    foods = entry.get("foods")
    if portion is None or "/" in portion:
        raise Broken("no name of its object", shown(entry.get("object")))
    if not isinstance(foods, list) or not foods:
        raise Broken("no foods", shown(foods))
    return portion, tuple(map(_weighed, foods))


def _weighed(entry: object) -> Weighed:
    if not isinstance(entry, dict):
        raise Broken("a food that is no object", shown(entry))
    food = text_of(entry.get("food"), "a food's name")
    if food is None:
        raise Broken("a food without a name")
    volume = entry.get("volume_ml")
    return Weighed(
        food.lower(),
        number_of(entry.get("grams"), "grams"),
        None if volume is None else number_of(volume, "volume_ml"),
    )


def _foods(source: Path, usda: str) -> dict[str, Food] | None:
    """Food -> its values per 100 g; None without tables."""
    folder = Path(usda) if usda else source.resolve().parent / "usda"
    if not usda and not folder.is_dir():
        return None
    table = load_foods(folder)
    return {food: table[choice.ndb_no] for food, choice in choices().items() if choice.ndb_no in table}


def _record(
    source: Path,
    entry: dict[str, Any],
    portion: str,
    parts: tuple[Weighed, ...],
    foods: Mapping[str, Food] | None,
) -> FoodRecord:
    image = text_of(entry.get("image"), "an image")
    if image is None:
        raise Broken("no image")
    ingredients = tuple(
        Ingredient(part.food, part.grams, "g", part.grams, _nutrition(part, foods or {})) for part in parts
    )
    return FoodRecord(
        id=f"{portion}/{entry['id'].removeprefix(f'{portion}_')}",
        image=str(look_up(source / safe_path(image)).resolve()),
        source="weighed-food",
        ingredients=ingredients,
        nutrition=_sum(ingredients),
    )


def _nutrition(part: Weighed, foods: Mapping[str, Food]) -> Nutrition:
    food = foods.get(part.food)
    if food is None:
        return Nutrition(mass=part.grams)
    of_100_g = {"energy": food.energy, "fat": food.fat, "protein": food.protein, "carb": food.carb}
    values = {name: part.grams * x / 100 for name, x in of_100_g.items()}
    return Nutrition(mass=part.grams, **values, micronutrients={})


def _sum(ingredients: tuple[Ingredient, ...]) -> Nutrition:
    """The whole portion's; unknown where one part's is."""
    totals: dict[str, float | None] = {}
    for name in NUTRITION_FIELDS:
        values = [getattr(i.nutrition, name) for i in ingredients]
        totals[name] = None if None in values else sum(values)
    return Nutrition(**totals, micronutrients={})
