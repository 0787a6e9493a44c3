"""A file of records itself (docs/records.md), as one more source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rode_food.look_up import look_up
from rode_food.readers.json_rows import read_json_lines
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, RecordError, record_from_json, with_images


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """The records of the JSONL file `source`, with images made absolute.

    What stops `rode_food.records.read_records` is a broken line here: no JSON, an unknown field, an id that stands twice.
    """
    folder = source.resolve().parent
    seen: set[str] = set()
    for number, value in read_json_lines(source, log):
        try:
            record = record_from_json(value)
            if record.id in seen:
                raise RecordError(f"id: {record.id!r} stands twice")
        except RecordError as error:
            log.leave_out_broken(
                "a record that breaks the schema", file=source, line=number, detail=str(error)
            )
        else:
            seen.add(record.id)
            yield with_images(record, (str(look_up(folder / image)) for image in record.images))
