"""One part of the golden stage's work on single records: does a label agree with the tables? And its page's entry."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from rode_food.images import ImageError, decode_picture, to_rgb
from rode_food.records import NUTRITION_FIELDS, FoodRecord, Ingredient, record_from_json
from rode_food.unifood.golden.settings import GoldenSettings
from rode_food.usda.compare import Comparison, compare, disagreements
from rode_food.usda.estimate import Estimator, shared_estimator
from rode_food.usda.tables import NUTRIENTS

THUMBNAIL = 256
"""Pixels of the longer side of a picture on the review page."""

NO_LABEL = "no nutrition label"
NOT_CHECKABLE = "not checkable"
OUTSIDE = "outside tolerance"


def check_lines(lines: list[str], settings: GoldenSettings) -> list[str]:
    """Records as JSON lines -> verdicts as JSON lines.

    A verdict has `id`, `category`, `reason` (None for a label that agrees), `fields` that are outside, `lacking` (ingredients whose
    food the table does not have, if any), and `numbers`.
    """
    estimator = shared_estimator(settings.usda or "", settings.state)
    return [_check(record_from_json(json.loads(line)), settings, estimator) for line in lines]


def _check(record: FoodRecord, settings: GoldenSettings, estimator: Estimator) -> str:
    comparison = compare(record, estimator)
    fields: list[str] = []
    if comparison is None:
        reason: str | None = NO_LABEL
    else:
        outside = disagreements(comparison, settings.limits)
        if outside is None:
            reason = NOT_CHECKABLE if settings.uncheckable == "drop" else None
        else:
            reason, fields = (OUTSIDE if outside else None), outside
    verdict = {
        "id": record.id,
        "category": record.category,
        "reason": reason,
        "fields": fields,
        "numbers": None if comparison is None else numbers_of(comparison),
    }
    lacking = (
        [part.estimate.lacks.name for part in comparison.parts if part.estimate.lacks] if comparison else []
    )
    if lacking:
        verdict["lacking"] = lacking
    return json.dumps(verdict, ensure_ascii=False)


def numbers_of(comparison: Comparison) -> dict[str, Any]:
    """Label and tables, rounded to what a person reads."""
    return {
        "label": {name: round(comparison.label[name], 1) for name in NUTRIENTS},
        "usda": {name: round(comparison.usda[name], 1) for name in NUTRIENTS},
        "mass_coverage": round(comparison.mass_coverage, 3),
        "energy_coverage": round(comparison.energy_coverage, 3),
        "label_mass": round(comparison.label_mass, 1),
        "line_mass": round(comparison.line_mass, 1),
        "weighed": round(comparison.weighed, 3),
    }


def page_lines(lines: list[str], settings: GoldenSettings) -> list[str]:
    """Records as JSON lines -> entries of the review page as JSON lines, each with its picture inside."""
    estimator = shared_estimator(settings.usda or "", settings.state)
    return [
        json.dumps(_entry(record_from_json(json.loads(line)), estimator), ensure_ascii=False)
        for line in lines
    ]


def _entry(record: FoodRecord, estimator: Estimator) -> dict[str, Any]:
    comparison = compare(record, estimator)
    rows = []
    for part in comparison.parts if comparison else ():
        nutrition = part.ingredient.nutrition
        match = part.estimate.match
        label = None
        if nutrition is not None:
            label = {name: getattr(nutrition, name) for name in NUTRIENTS}
        rows.append(
            {
                "text": part.ingredient.text or _stated(part.ingredient),
                "mass": part.ingredient.mass,
                "grams": None if part.estimate.grams.grams is None else round(part.estimate.grams.grams, 1),
                "how": part.estimate.grams.how,
                "food": None if match is None else match.food.description,
                "match": None if match is None else match.how,
                "label": label,
                "usda": None if part.usda is None else {k: round(v, 1) for k, v in part.usda.items()},
            }
        )
    image, problem = thumbnail(record)
    nutrition = record.nutrition
    return {
        "id": record.id,
        "title": record.title,
        "category": record.category,
        "mass": None if nutrition is None else getattr(nutrition, NUTRITION_FIELDS[0]),
        "numbers": None if comparison is None else numbers_of(comparison),
        "ingredients": rows,
        "image": image,
        "problem": problem,
    }


def _stated(ingredient: Ingredient) -> str:
    amount = "" if ingredient.amount is None else f"{ingredient.amount:.4g}"
    return " ".join(part for part in (amount, ingredient.unit, ingredient.name) if part)


def thumbnail(record: FoodRecord) -> tuple[str | None, str | None]:
    """(a JPEG as a data URI, None), or (None, what is wrong with the picture)."""
    try:
        small = to_rgb(decode_picture(record.image, THUMBNAIL))
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        out = io.BytesIO()
        small.save(out, "JPEG", quality=70)
    except (ImageError, OSError, ValueError) as error:
        return None, str(error)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode(), None
