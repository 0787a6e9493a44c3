"""Stage aggregate: a dish's nutrition is the sum over its ingredients (arXiv 2407.12730, section 3)."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from rode_food.atomic import replacing
from rode_food.records import (
    NUTRITION_FIELDS,
    FoodRecord,
    Ingredient,
    Nutrition,
    Quantity,
    record_from_json,
    record_to_json,
    write_records,
)
from rode_food.unifood.settings import AggregateSettings
from rode_food.unifood.stage import Stage

_GRAMS = {"g": 1.0, "mg": 1e-3, "ug": 1e-6, "µg": 1e-6, "μg": 1e-6, "mcg": 1e-6}


def run(stage: Stage) -> dict[str, Any]:
    """Writes `output`, and `set_aside.jsonl` with id and reason for dishes whose sum cannot be right."""
    lines = (json.dumps(record_to_json(record), ensure_ascii=False) for record in stage.records())
    rows = stage.in_parts("sums", partial(aggregate, stage.settings.aggregate), lines)
    reasons: Counter[str] = Counter()
    with replacing(stage.folder / "set_aside.jsonl") as aside:

        def records() -> Iterator[FoodRecord]:
            for row in map(json.loads, rows):
                if "reason" in row:
                    reasons[row["reason"]] += 1
                    aside.write(json.dumps(row, ensure_ascii=False) + "\n")
                else:
                    yield record_from_json(row)

        written = write_records(stage.output, records())
    stage.drop_parts("sums")
    return {"records": written, "set_aside": dict(reasons)}


def aggregate(settings: AggregateSettings, lines: list[str]) -> list[str]:
    """Records as JSON with the dish's nutrition, or {"id", "reason", "detail"}."""
    done = []
    for line in lines:
        record = record_from_json(json.loads(line))
        nutrition = total(record.ingredients, settings.micronutrient_coverage)
        missing = [name for name in NUTRITION_FIELDS if getattr(nutrition, name) is None]
        row: dict[str, Any]
        if missing:
            row = {"id": record.id, "reason": "an ingredient without a number", "detail": ", ".join(missing)}
        elif not settings.min_mass <= (nutrition.mass or 0) <= settings.max_mass:
            row = {
                "id": record.id,
                "reason": "a mass that no dish has",
                "detail": f"{nutrition.mass:g} g",
            }
        else:
            row = record_to_json(dataclasses.replace(record, nutrition=nutrition))
        done.append(json.dumps(row, ensure_ascii=False))
    return done


def total(ingredients: tuple[Ingredient, ...], coverage: float = 1.0) -> Nutrition:
    """The sum over ingredients; a field that one of them lacks is unknown in the sum.

    Args:
        ingredients: with `nutrition`, or at least `mass`.
        coverage: a micronutrient is summed where the ingredients that state it have this share of the mass; those that do
            not state it count as 0 then. Grams, milligrams and micrograms are converted into the unit met first; other
            units (IU, say) are summed only with their like.
    """
    parts = [
        ingredient.nutrition or Nutrition(mass=ingredient.mass)  # the mass may be all that is known
        for ingredient in ingredients
    ]
    sums: dict[str, float | None] = {}
    for name in NUTRITION_FIELDS:
        values = [getattr(part, name) for part in parts]
        # fsum: rounded once, so 0.1 + 0.2 + 0.3 is 0.6
        sums[name] = math.fsum(values) if parts and None not in values else None
    return Nutrition(**sums, micronutrients=_micronutrients(parts, sums["mass"], coverage))


def _micronutrients(parts: list[Nutrition], mass: float | None, coverage: float) -> dict[str, Quantity]:
    stated: dict[str, list[tuple[float, Quantity]]] = {}
    for part in parts:
        for name, quantity in part.micronutrients.items():
            stated.setdefault(name, []).append((part.mass or 0.0, quantity))
    sums = {}
    for name, entries in sorted(stated.items()):
        unit = entries[0][1].unit
        values = [_convert(quantity, unit) for _, quantity in entries]
        if mass and None not in values and math.fsum(m for m, _ in entries) >= coverage * mass * (1 - 1e-9):
            sums[name] = Quantity(math.fsum(value for value in values if value is not None), unit)
    return sums


def _convert(quantity: Quantity, unit: str) -> float | None:
    if quantity.unit == unit:
        return quantity.value
    if quantity.unit in _GRAMS and unit in _GRAMS:
        return quantity.value * _GRAMS[quantity.unit] / _GRAMS[unit]
    return None
