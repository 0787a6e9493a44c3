"""Helpers for picture data sets with one class a picture: lists of pictures, and records made from them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rode_food.look_up import look_up
from rode_food.readers.common import Broken, read_lines, safe_path
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient

Listed = tuple[int, str]
"""A line's number and its text."""


def records(
    lists: Iterable[tuple[Path, str, Iterable[Listed]]],
    root: Path,
    source: str,
    log: ReadLog,
    read_line: Callable[[str], tuple[str, str]],
    ingredients: Callable[[str], tuple[Ingredient, ...]] = lambda path: (),
) -> Iterator[FoodRecord]:
    """One record a picture; its id is its path below `root`, without the suffix. Pictures that no list names are not read.

    Args:
        lists: (file, split, its lines).
        read_line: from a line to (path below `root`, class); may raise Broken.
        ingredients: from the path as the line has it to what the picture is labelled with; may raise Broken.
    """
    root = root.resolve()
    seen: set[str] = set()
    for file, split, lines in lists:
        for number, text in lines:
            try:
                listed, category = read_line(text)
                path = safe_path(listed)
                identifier = path.rsplit(".", 1)[0]
                if identifier in seen:
                    raise Broken("a picture that is listed twice", path)
                labels = ingredients(listed)
            except Broken as error:
                log.leave_out_broken(error.reason, file=file, line=number, detail=error.detail)
                continue
            seen.add(identifier)
            picture = look_up(root / path)
            if not picture.is_file():
                log.leave_out("no picture on disk", file=file, line=number, detail=path)
                continue
            yield FoodRecord(
                id=identifier,
                image=str(picture),
                source=source,
                category=category,
                ingredients=labels,
                split=split,
            )


def names_in(path: Path, log: ReadLog) -> list[str]:
    """One name a line, in the file's order."""
    return [" ".join(text.replace("_", " ").split()) for _, text in read_lines(path, log)]
