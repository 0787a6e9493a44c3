"""The library's reading put into records, where names and amounts are needed: `rode data convert`, and after selection.

Readers give each ingredient a first reading (`rode_food.lines.simple`) and keep the line as `text`. A field that says what the
first reading says is replaced; one that the source itself states (a publisher's name, a weighed mass) stays.
"""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from rode_food.lines import library
from rode_food.lines.prepare import prepare
from rode_food.lines.reading import Line, read_line, read_lines, to_ingredient
from rode_food.lines.simple import parse_ingredient_line
from rode_food.records import FoodRecord, Ingredient, record_from_json, record_to_json

if TYPE_CHECKING:
    from rode_food.unifood.stage import Engine

_FIELDS = ("name", "amount", "unit", "mass")
_PART = 200  # records


@functools.cache
def why_simple() -> str | None:
    """One sentence that says why lines are read by the simple parser; None where the library is there.

    It is also a warning, once in each process.
    """
    try:
        library.parser()
    except (ImportError, OSError) as error:
        reason = f"ingredient lines are read by a simple parser, worse: {error}"
        warnings.warn(reason, stacklevel=2)
        return reason
    return None


def read_ingredient(text: str) -> Ingredient | None:
    """One line by the library, or by the simple parser where it is not there; see `why_simple`."""
    if why_simple() is not None:
        return parse_ingredient_line(text)
    return to_ingredient(read_line(text), text)


def with_readings(rows: list[str]) -> list[str]:
    """Records as JSON, their lines read by the library: `{"record": ..., "notes": [...]}` for each.

    A module's own function, so that it can run in other processes. Without the library the records stay as they are.
    """
    records = [json.loads(row) for row in rows]
    texts = [i["text"] for record in records for i in record.get("ingredients", ()) if i.get("text")]
    texts = list(dict.fromkeys(texts))
    lines: dict[str, Line] = {}
    if texts and why_simple() is None:
        lines = dict(zip(texts, read_lines(texts), strict=True))
    results = []
    for record in records:
        notes = []
        for ingredient in record.get("ingredients", ()):
            line = lines.get(ingredient.get("text", ""))
            if line is not None:
                _put(ingredient, line)
                notes += [f"{note}: {ingredient['text']}" for note in line.notes]
        results.append(json.dumps({"record": record, "notes": notes}, ensure_ascii=False))
    return results


def _put(ingredient: dict[str, Any], line: Line) -> None:
    text = ingredient["text"]
    found, first = to_ingredient(line, text), _first(text)
    if found is None:
        return
    for name in _FIELDS:
        if ingredient.get(name) == (None if first is None else getattr(first, name)):
            value = getattr(found, name)
            if value is None:
                ingredient.pop(name, None)
            else:
                ingredient[name] = value


@functools.lru_cache(maxsize=20_000)
def _first(text: str) -> Ingredient | None:
    return parse_ingredient_line(text)


def read_again(records: Iterable[FoodRecord], engine: Engine) -> Iterator[tuple[FoodRecord, list[str]]]:
    """(record, doubts about its lines) for every record, in order, the lines read by the library on `engine`."""
    rest = iter(records)

    def parts() -> Iterator[tuple[int, list[str]]]:
        number = 0
        while chunk := list(islice(rest, _PART)):
            yield number, [json.dumps(record_to_json(record), ensure_ascii=False) for record in chunk]
            number += 1

    waiting: dict[int, list[str]] = {}
    turn = 0
    for number, rows in engine.map(with_readings, parts()):
        waiting[number] = rows
        while turn in waiting:
            for row in waiting.pop(turn):
                answer = json.loads(row)
                yield record_from_json(answer["record"]), answer["notes"]
            turn += 1


def slash_notes(text: str) -> tuple[str, ...]:
    """Doubts that need no library: lost slashes."""
    return prepare(text).notes if text[:2].strip().isdigit() else ()
