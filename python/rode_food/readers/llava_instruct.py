"""LLaVA-instruct: an array (or lines) of `{"id", "image", "conversations": [{"from", "value"}, ...]}`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rode_food.readers.conversations import Row, Rows
from rode_food.readers.json_rows import read_json_rows
from rode_food.readers.log import ReadLog
from rode_food.readers.picture_files import PictureFiles
from rode_food.records import FoodRecord


def read(source: Path, log: ReadLog, pictures: Path, image_folder: str = "") -> Iterator[FoodRecord]:
    """The entries of the file `source` as records, each with one conversation.

    Args:
        source: the file.
        log: is told.
        pictures: folder for pictures that have no file, those in data URLs.
        image_folder: the folder to which pictures' paths are relative; the file's own by default.
    """
    rows = (
        Row(number, source, line, None, value)
        for number, (line, value) in enumerate(read_json_rows(source, log, "conversations"))
    )
    base = Path(image_folder) if image_folder else source.parent
    yield from Rows(source.name.partition(".")[0], PictureFiles(base, pictures), log).records(
        rows, "conversations"
    )
