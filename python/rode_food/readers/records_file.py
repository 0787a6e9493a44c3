"""A file of records itself (docs/records.md), as one more source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, RecordError, record_from_json, with_images


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """The records of the JSONL file `source`, with images made absolute.

    What stops `rode_food.records.read_records` is a broken line here: no JSON, an unknown field, an id that stands twice.
    """
    folder = source.resolve().parent
    seen: set[str] = set()
    with source.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                value = json.loads(text)
                json.dumps(value, ensure_ascii=False).encode(
                    "utf-8"
                )  # half a surrogate pair cannot be written again
                record = record_from_json(value)
                if record.id in seen:
                    raise RecordError(f"id: {record.id!r} stands twice")
            except UnicodeDecodeError as error:
                log.leave_out_broken("invalid UTF-8", file=source, line=number, detail=error.reason)
            except RecordError as error:
                log.leave_out_broken(
                    "a record that breaks the schema", file=source, line=number, detail=str(error)
                )
            except (ValueError, RecursionError) as error:
                detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                log.leave_out_broken("invalid JSON", file=source, line=number, detail=detail)
            else:
                seen.add(record.id)
                yield with_images(record, (str(folder / image) for image in record.images))
