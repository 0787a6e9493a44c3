"""Helpers that readers share: text, numbers, lines and pictures as publishers ship them, checked."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from rode_food.lines.simple import parse_ingredient_line
from rode_food.readers.json_array import Entry
from rode_food.readers.log import ReadLog
from rode_food.records import Ingredient, RecordError

# of one folder or file, in any script: no separator, no drive, no sign that a shell or Windows takes for another, not hidden
_NAME = re.compile(r"(?![.~\s])[^/\\:*?\"<>|\x00-\x1f\x7f]+")


class Broken(ValueError):
    """An entry that cannot be used: `reason` in words that fit after "with", `detail` what was met."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def text_of(value: object, field: str) -> str | None:
    """One line of text, or None for nothing but white space. Raises Broken for what is no string."""
    if not isinstance(value, str):
        raise Broken(f"{field} that is no text", shown(value))
    return " ".join(value.split()) or None


def texts_of(value: object, field: str) -> list[str | None]:
    """`[{"text": ...}, ...]`, as Recipe1M writes its lists, empty ones as None; nothing at all is an empty list."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise Broken(f"{field} that are no list", shown(value))
    return [
        text_of(item.get("text") if isinstance(item, dict) else item, f"an entry of {field}")
        for item in value
    ]


def number_of(value: Any, field: str) -> float:
    """A finite number, not negative; text is taken as a number. Raises Broken."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise Broken(f"{field} that is no number", shown(value)) from None
    if not math.isfinite(number) or number < 0:
        raise Broken(f"{field} that is no finite number >= 0", shown(value))
    return number


@lru_cache(maxsize=20_000)  # "1 teaspoon salt" stands in every tenth recipe
def line_to_ingredient(line: str) -> Ingredient | None:
    """`parse_ingredient_line`, with the line itself as `text`; a number beyond all bounds is dropped."""
    found = parse_ingredient_line(line)
    if found is None:
        return None
    return dataclasses.replace(found, text=line, amount=_finite(found.amount), mass=_finite(found.mass))


NO_INGREDIENT = "a line that names no ingredient"


def _finite(number: float | None) -> float | None:
    return None if number is None or not math.isfinite(number) else number


def safe_name(name: object) -> str:
    """A file's name that cannot lead out of its folder. Raises Broken for any other."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith((".", " ")):
        path = isinstance(name, str) and any(part in name for part in ("/", "\\", "..", ":"))
        raise Broken(
            "a picture outside its folder" if path else "a picture's name of odd letters", shown(name)
        )
    return name


def safe_path(path: str) -> str:
    """A relative path of safe names, `/` between them; one `/` in front is dropped. Raises Broken for any other."""
    return "/".join(safe_name(part) for part in path.removeprefix("/").split("/"))


def read_lines(path: Path, log: ReadLog) -> Iterator[tuple[int, str]]:
    """(number from 1, text without the line's end) of lines that are not blank; one that is no UTF-8 is broken."""
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            except UnicodeDecodeError as error:
                log.leave_out_broken("invalid UTF-8", file=path, line=number, detail=error.reason)
                continue
            if text:
                yield number, text


def first_existing(paths: Iterable[Path], what: str) -> Path:
    """Raises RecordError that names all that were looked for."""
    paths = list(paths)
    for path in paths:
        if path.exists():
            return path
    raise RecordError(f"{what}: none of {', '.join(map(str, paths))} exists")


def split_of(value: object, names: Mapping[str, str]) -> str:
    if not isinstance(value, str) or value not in names:
        raise Broken("an unknown partition", shown(value))
    return names[value]


def id_hash(identifier: str) -> int:
    """64 bits of BLAKE2b: among a million ids two of them agree with a probability of 3e-8."""
    return int.from_bytes(hashlib.blake2b(identifier.encode(), digest_size=8).digest(), "little")


def unique(entries: Iterator[Entry], path: Path, log: ReadLog) -> Iterator[Entry]:
    """Entries that have an id which has not been seen; the others are broken."""
    seen: set[int] = set()
    for entry in entries:
        identifier = entry.value.get("id")
        if not isinstance(identifier, str) or not identifier.strip():
            log.leave_out_broken("no id", file=path, line=entry.line)
        elif (hashed := id_hash(identifier)) in seen:
            log.leave_out_broken("an id that stands twice", file=path, line=entry.line, detail=identifier)
        else:
            seen.add(hashed)
            yield entry
