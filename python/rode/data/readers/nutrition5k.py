"""Nutrition5k (Thames et al., 2021): plates weighed ingredient by ingredient.

Here: one JSON object per dish in `dishes.jsonl`, overhead pictures in `sample_images/DISH_ID.jpg`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode.data.readers.log import ReadLog
from rode.data.records import FoodRecord, Ingredient, Nutrition, RecordError

_KEYS = {"mass": "mass_g", "energy": "kcal", "fat": "fat_g", "protein": "protein_g", "carb": "carb_g"}


def read_jsonl(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """Reads `source/dishes.jsonl`; a dish without a picture, or of no mass, is left out and counted.

    The dish's own totals are taken, not the sum over its ingredients. There is no split.

    Raises:
        RecordError: for a dish that lacks a field; names file, line and field.
    """
    path = source / "dishes.jsonl"
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                dish = json.loads(line)
                image = source / "sample_images" / f"{dish['dish_id']}.jpg"
                if not image.is_file():
                    log.leave_out("no picture")
                elif dish["mass_g"] <= 0:
                    log.leave_out("no mass")
                else:
                    yield FoodRecord(
                        id=dish["dish_id"],
                        image=str(image.resolve()),
                        source="nutrition5k",
                        ingredients=tuple(map(_ingredient, dish["ingredients"])),
                        nutrition=_nutrition(dish),
                    )
            except json.JSONDecodeError as error:
                raise RecordError(f"{path}:{number}: not JSON: {error.msg}") from None
            except KeyError as error:
                raise RecordError(f"{path}:{number}: {error.args[0]}: missing") from None
            except (TypeError, AttributeError):
                raise RecordError(f"{path}:{number}: not a dish: {line.strip()[:60]}") from None


def _nutrition(entry: dict[str, Any]) -> Nutrition:
    return Nutrition(**{name: float(entry[key]) for name, key in _KEYS.items()})


def _ingredient(entry: dict[str, Any]) -> Ingredient:
    grams = float(entry["mass_g"])
    return Ingredient(entry["name"], amount=grams, unit="g", mass=grams, nutrition=_nutrition(entry))
