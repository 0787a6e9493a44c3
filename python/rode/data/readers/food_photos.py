"""Photographs of dishes with a recipe each: `photos.json` (a list of objects) beside `images/`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode.data.ingredient_lines import parse_ingredient_line
from rode.data.readers.log import ReadLog
from rode.data.records import FoodRecord, Ingredient, RecordError

_NEEDED = {"id": str, "title": str, "image": str, "ingredients": list, "instructions": list}
# some recipes list their tools among the ingredients; the last word tells ("hot pot base" is food)
_TOOL_WORDS = (
    "pot pan wok cooker oven knife bowl strainer mesh filter sieve mold mould thermometer fryer blender tray trays "
    "spatula chopsticks cloth pin paper papers foil cup dustpans"
)
_TOOLS = frozenset(_TOOL_WORDS.split())


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """Reads `source/photos.json`.

    `ingredients` hold a line each, which may carry its amount; `amounts`, where present, hold the amounts of
    the same ingredients as lines of their own. `category` is taken as it stands. The contributor's
    `kcal_estimate` is not taken: whether it means a dish, a portion or 100 g is unknown, and it stands alone,
    so these records answer no nutrition question. There is no split.

    Raises:
        RecordError: for an entry that lacks a field; names file and entry.
    """
    path = source / "photos.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list):
        raise RecordError(f"{path}: expected a list of recipes, got {type(entries).__name__}")
    for number, entry in enumerate(entries):
        for key, kind in _NEEDED.items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise RecordError(f"{path}: entry {number}: {key}: expected a {kind.__name__}")
        ingredients = _ingredients(entry)
        steps = tuple(step for step in map(_step, entry["instructions"]) if step)
        if not ingredients and not steps:
            log.leave_out("neither ingredients nor instructions")
            continue
        yield FoodRecord(
            id=entry["id"],
            image=str((source / entry["image"]).resolve()),
            source=entry["id"].split("_", 1)[0],
            title=entry["title"],
            category=entry.get("category") or None,
            ingredients=ingredients,
            instructions=steps,
        )


def _step(text: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # Markdown links and pictures
    return " ".join(text.replace("**", "").split())


def _ingredients(entry: dict[str, Any]) -> tuple[Ingredient, ...]:
    amounts = entry.get("amounts")
    lines = entry["ingredients"]
    if amounts is not None:
        # then the ingredients are bare names, and one line may list several of them
        lines = [name for line in lines for name in re.split(r"[,、，](?![^(（]*[)）])", line)]
    stated = {i.name: i for i in map(parse_ingredient_line, amounts or []) if i is not None}
    found: dict[str, Ingredient] = {}
    for line in lines:
        ingredient = parse_ingredient_line(line)
        if ingredient is None or ingredient.name.split()[-1] in _TOOLS:
            continue
        if ingredient.amount is None:
            ingredient = stated.get(ingredient.name, ingredient)
        found.setdefault(ingredient.name, ingredient)
    return tuple(found.values())
