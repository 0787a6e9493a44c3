"""Photographs of dishes with a recipe each: `photos.json` (a list of objects) beside `images/`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.lines.add_up import added_up
from rode_food.look_up import look_up
from rode_food.readers.common import (
    NO_INGREDIENT,
    Broken,
    line_to_ingredient,
    safe_path,
    shown,
    unique,
)
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient

KEYS = ("id", "image", "title", "ingredients", "instructions")
_NEEDED = {"id": str, "title": str, "image": str, "ingredients": list, "instructions": list}
# some recipes list their tools among the ingredients; the last word tells ("hot pot base" is food)
_TOOL_WORDS = (
    "pot pan wok cooker oven knife bowl strainer mesh filter sieve mold mould thermometer fryer blender tray trays "
    "spatula chopsticks cloth pin paper papers foil cup dustpans"
)
_TOOLS = frozenset(_TOOL_WORDS.split())
_EDIBLE = re.compile(
    r"\b(?:rice|wafer|edible|sugar|fruit|tofu|bean curd) papers?$|"
    r"\b(?:peanut butter|chocolate|pastry|phyllo|filo|tart|lettuce|fruit|pudding|noodle) cups?$"
)


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """Reads `source/photos.json`.

    `ingredients` hold a line each, which may carry its amount; `amounts`, where present, hold the amounts of the same
    ingredients as lines of their own; the line that says more is the ingredient's `text`. An ingredient that stands in several
    lines is added up. Tools among the ingredients are not taken, which is noted. `category` is taken as it stands. `source` is
    the field of that name, else the folder's name.
    The contributor's `kcal_estimate` is not taken: whether it means a dish, a portion or 100 g is unknown, and it stands
    alone, so these records answer no nutrition question. There is no split.

    Raises:
        RecordError: the file holds no JSON array; a broken entry, if `log.strict`.
    """
    path = source / "photos.json"
    for entry in unique(read_json_array(path, log, keys=("id", "image")), path, log):
        try:
            odd: list[tuple[str, str]] = []
            record = _record(source, entry.value, odd)
        except Broken as error:
            log.leave_out_broken(error.reason, file=path, line=entry.line, detail=error.detail)
            continue
        for reason, line in odd:
            log.note(reason, file=path, line=entry.line, detail=line)
        if record.ingredients or record.instructions:
            yield record
        else:
            log.leave_out("neither ingredients nor instructions", file=path, line=entry.line)


def _record(source: Path, entry: dict[str, Any], odd: list[tuple[str, str]]) -> FoodRecord:
    for key, kind in _NEEDED.items():
        if not isinstance(entry.get(key), kind):
            raise Broken(f"no {key}", f"expected a {kind.__name__}, got {shown(entry.get(key))}")
    for key in ("source", "category"):
        if entry.get(key) is not None and not isinstance(entry[key], str):
            raise Broken(f"{key} that is no text", shown(entry[key]))
    for key in ("ingredients", "instructions", "amounts"):
        if not all(isinstance(line, str) for line in entry.get(key) or ()):
            raise Broken(f"{key} that are no text", shown(entry[key]))
    return FoodRecord(
        id=entry["id"],
        image=str(look_up(source / safe_path(entry["image"])).resolve()),
        source=entry.get("source") or source.resolve().name,
        title=entry["title"].strip() or None,
        category=entry.get("category") or None,
        ingredients=_ingredients(entry, odd),
        instructions=tuple(step for step in map(_step, entry["instructions"]) if step),
    )


def _step(text: str) -> str:
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # Markdown links and pictures
    return " ".join(text.replace("**", "").split())


def _ingredients(entry: dict[str, Any], odd: list[tuple[str, str]]) -> tuple[Ingredient, ...]:
    """`odd` is given (reason, line) for each line that is not taken."""
    amounts = entry.get("amounts")
    lines = entry["ingredients"]
    if amounts is not None:
        # then the ingredients are bare names, and one line may list several of them
        lines = [name for line in lines for name in re.split(r"[,、，](?![^(（]*[)）])", line)]
    stated = {i.name: i for i in map(line_to_ingredient, amounts or []) if i is not None}
    found: list[Ingredient] = []
    for line in lines:
        ingredient = line_to_ingredient(line)
        if ingredient is None:
            odd.append((NO_INGREDIENT, line))
            continue
        if ingredient.name.split()[-1] in _TOOLS and not _EDIBLE.search(ingredient.name):
            odd.append(("a tool among the ingredients", line))
            continue
        if ingredient.amount is None:
            ingredient = stated.get(ingredient.name, ingredient)
        found.append(ingredient)
    return added_up(found)
