"""From a published layout to a file of records."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rode_food.images import ImageError, check_image
from rode_food.lines.apply import read_again, why_simple
from rode_food.readers import read_source
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, write_records
from rode_food.source import hash_split
from rode_food.unifood.engines import make_engine

LINE_READERS = ("library", "simple")
DEFAULT_FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Conversion:
    """The outcome of `convert`: records by split, how many were left out for which reason, and which doubts there are."""

    written: dict[str, int]
    left_out: dict[str, int]
    noted: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        written = ", ".join(f"{count} {split}" for split, count in self.written.items())
        left_out = ", ".join(f"{count} with {reason}" for reason, count in self.left_out.items())
        text = f"wrote {sum(self.written.values())} records ({written or 'none'})"
        text = f"{text}; left out {left_out}" if left_out else text
        noted = ", ".join(f"{count} x {reason}" for reason, count in self.noted.items())
        return f"{text}; noted {noted}" if noted else text


def convert(
    kind: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    on_bad_image: str = "error",
    strict: bool = False,
    lines: str = "library",
    workers: int | None = None,
    **options: bool | int | str,
) -> Conversion:
    """Reads data in a published layout and writes one JSONL file of records.

    Pictures stay where they are: the records hold their absolute paths, or relative ones if they lie below
    the folder of `out`. Pictures that stand in the data itself are written to OUT_pictures beside it.

    Args:
        kind: a key of `rode_food.readers.READERS`.
        source: the data's folder; the file for kind `records`.
        out: the JSONL file to write; its folder is made, an older file replaced.
        fractions, seed: of `hash_split`, for records without a split of their own.
        on_bad_image: "error", or "skip" to leave such records out and count them.
        lines: "library" reads ingredient lines with ingredient-parser-nlp where it is installed, else by a simple parser, which
            is noted; "simple" takes that one, for it is a hundred times as fast.
        workers: processes that read lines; as many as this one may use processors by default.
        strict: stop at the first entry that is broken; else it is left out and counted.
        options: of the reader: `rode_food.readers.OPTIONS`.

    Raises:
        ValueError: for an unknown kind, a source that is not there, an option that the kind does not take, or
            `on_bad_image` or `lines` of another value.
        RecordError, ImageError: for data that cannot be used; names file or record.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image: expected error or skip, got {on_bad_image!r}")
    if lines not in LINE_READERS:
        raise ValueError(f"lines: expected one of {', '.join(LINE_READERS)}, got {lines!r}")
    written: Counter[str] = Counter()
    log = ReadLog(strict=strict)
    beside = Path(out).resolve()
    pictures = beside.with_name(f"{beside.name.partition('.')[0]}_pictures")
    source_records = read_source(kind, source, log, pictures=pictures, **options)

    def asked() -> Iterator[FoodRecord]:
        """The source's records. The library, whose import takes seconds, is asked for at the first line, if there is any."""
        asked_for = False
        for record in source_records:
            if not asked_for and any(ingredient.text for ingredient in record.ingredients):
                asked_for = True
                if why_simple() is not None:
                    log.note("the library of ingredient lines is missing: a simple parser read them")
            yield record

    def read() -> Iterator[FoodRecord]:
        if lines == "simple":
            yield from source_records
            return
        for record, doubts in read_again(asked(), make_engine("local", workers)):
            for doubt in doubts:
                log.note(doubt.partition(":")[0], detail=f"record {record.id!r}: {doubt}")
            yield record

    def records() -> Iterator[FoodRecord]:
        for record in read():
            try:
                check_image(record)
            except ImageError as error:
                if on_bad_image == "error":
                    raise
                log.leave_out("a missing or corrupt image", detail=str(error))
                continue
            if record.split is None:
                record = dataclasses.replace(record, split=hash_split(record.id, fractions, seed))
            written[record.split or ""] += 1
            yield record

    write_records(out, records())
    return Conversion(dict(written), dict(log.counts), dict(log.notes))
