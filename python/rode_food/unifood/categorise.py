"""Stage categorise: a category for every record whose source states none, from its title."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from rode_food.records import FoodRecord, record_from_json, record_to_json, write_records
from rode_food.unifood.categories import Categories
from rode_food.unifood.stage import Stage


def run(stage: Stage) -> dict[str, Any]:
    """Writes `output`; the categories are those that select found in the titles of all training candidates."""
    assert stage.source is not None
    categories = Categories.load(stage.source.with_name("categories.json"))
    lines = (json.dumps(record_to_json(record), ensure_ascii=False) for record in stage.records())
    rows = stage.in_parts("records", partial(categorise, categories), lines)
    stated = found = 0

    def records() -> Iterator[FoodRecord]:
        nonlocal stated, found
        for record, row in zip(stage.records(), rows, strict=True):
            done = record_from_json(json.loads(row))
            stated += record.category is not None
            found += record.category is None and done.category is not None
            yield done

    written = write_records(stage.output, records())
    stage.drop_parts("records")
    return {"records": written, "stated": stated, "from_title": found, "none": written - stated - found}


def categorise(categories: Categories, lines: list[str]) -> list[str]:
    """Records as JSON, with their category where the title names one."""
    done = []
    for line in lines:
        record = record_from_json(json.loads(line))
        if record.category is None:
            record = dataclasses.replace(record, category=categories.of(record.title))
        done.append(json.dumps(record_to_json(record), ensure_ascii=False))
    return done
