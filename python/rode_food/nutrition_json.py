"""JSON in an answer: the object itself, one in a fence or between words, its keys and values as (words, value)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

_DEEPEST = 6
_NAMES = ("name", "nutrient", "label", "field")


def find_pairs(text: str) -> list[tuple[str, str]]:
    """(key in words, value with its unit as text) of all numbers in the JSON of a text, those of the outermost objects first.

    `{"fat_g": 2}` gives ("fat g", "2"), `{"fat": {"value": "2", "unit": "g"}}` gives ("fat", "2 g"). Empty without JSON.
    """
    found: list[tuple[int, str, str]] = []
    for value in _values(text):
        found += _walk(value, "", 0)
    return [(key, value) for _, key, value in sorted(found, key=lambda pair: pair[0])]


def _values(text: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    at = 0
    while (start := min((i for i in (text.find("{", at), text.find("[", at)) if i >= 0), default=-1)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
            continue
        yield value


def _walk(value: Any, key: str, depth: int) -> Iterator[tuple[int, str, str]]:
    if depth > _DEEPEST:
        return
    if isinstance(value, dict):
        number = next((value[k] for k in ("value", "amount", "quantity") if _is_number(value.get(k))), None)
        name = next((value[k] for k in _NAMES if isinstance(value.get(k), str)), key)
        if number is not None and name:
            yield depth, _words(name), f"{_plain(number)} {value.get('unit') or ''}".strip()
            return
        for inner, entry in value.items():
            yield from _walk(entry, str(inner), depth + 1)
    elif isinstance(value, list):
        for entry in value:
            yield from _walk(entry, key, depth + 1)
    elif _is_number(value) and key:
        yield depth, _words(key), _plain(value)


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or (
        isinstance(value, str) and any(c.isdigit() for c in value)
    )


def _plain(number: int | float | str) -> str:
    """Without an exponent, which is JSON's but no cook's."""
    if isinstance(number, str):
        return number
    if isinstance(number, int):
        return str(number) if abs(number) < 10**15 else ""
    return f"{number:.10f}".rstrip("0").rstrip(".") if abs(number) < 1e15 else ""


def _words(key: str) -> str:
    """ "fatG" and "fat_g" are "fat g"."""
    return " ".join(re.sub(r"(?<=[a-z])(?=[A-Z])(?!(?<=k)J)|[_\-]+", " ", key).split())
