"""Nutrition5k (Thames et al., 2021): plates weighed ingredient by ingredient.

Here: one JSON object per dish in `dishes.jsonl`, overhead pictures in `sample_images/DISH_ID.jpg`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.look_up import look_up
from rode_food.readers.common import Broken, number_of, read_lines, safe_name, text_of
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient, Nutrition

_KEYS = {"mass": "mass_g", "energy": "kcal", "fat": "fat_g", "protein": "protein_g", "carb": "carb_g"}


def read_jsonl(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """Reads `source/dishes.jsonl`; a dish without a picture, or of no mass, is left out and counted.

    The dish's own totals are taken, not the sum over its ingredients. There is no split.

    Raises:
        RecordError: for a broken dish, if `log.strict`; names file, line and field.
    """
    path = source / "dishes.jsonl"
    seen: set[str] = set()
    for number, line in read_lines(path, log):
        try:
            record = _record(source, line)
            if record.id in seen:
                raise Broken("an id that stands twice", record.id)
        except Broken as error:
            log.leave_out_broken(error.reason, file=path, line=number, detail=error.detail)
            continue
        seen.add(record.id)
        if not Path(record.image).is_file():
            log.leave_out("no picture", file=path, line=number, detail=record.id)
        elif not (record.nutrition and record.nutrition.mass):
            log.leave_out("no mass", file=path, line=number, detail=record.id)
        else:
            yield record


def _record(source: Path, line: str) -> FoodRecord:
    try:
        dish = json.loads(line)
        return FoodRecord(
            id=safe_name(dish["dish_id"]),
            image=str(look_up(source / "sample_images" / f"{dish['dish_id']}.jpg").resolve()),
            source="nutrition5k",
            ingredients=tuple(map(_ingredient, dish["ingredients"])),
            nutrition=_nutrition(dish),
        )
    except KeyError as error:
        raise Broken("a field that is missing", str(error.args[0])) from None
    except json.JSONDecodeError as error:
        raise Broken("invalid JSON", error.msg) from None
    except (TypeError, AttributeError, RecursionError):
        raise Broken("a line that is no dish", line[:60]) from None


def _nutrition(entry: dict[str, Any]) -> Nutrition:
    numbers = {name: number_of(entry[key], key) for name, key in _KEYS.items()}
    return Nutrition(**numbers, micronutrients={})


def _ingredient(entry: dict[str, Any]) -> Ingredient:
    name = text_of(entry["name"], "a name")
    if name is None:
        raise Broken("an ingredient without a name")
    nutrition = _nutrition(entry)
    return Ingredient(name, amount=nutrition.mass, unit="g", mass=nutrition.mass, nutrition=nutrition)
