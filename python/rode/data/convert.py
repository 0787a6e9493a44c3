"""From a published layout to a file of records."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rode.data.images import ImageError, check_image
from rode.data.mixture import hash_split
from rode.data.readers import READERS
from rode.data.readers.log import ReadLog
from rode.data.records import FoodRecord, write_records

DEFAULT_FRACTIONS = {"train": 0.8, "val": 0.1, "test": 0.1}


@dataclass(frozen=True)
class Conversion:
    """What `convert` did: records by split, and how many were left out for which reason."""

    written: dict[str, int]
    left_out: dict[str, int]

    def __str__(self) -> str:
        written = ", ".join(f"{count} {split}" for split, count in self.written.items())
        left_out = ", ".join(f"{count} with {reason}" for reason, count in self.left_out.items())
        text = f"wrote {sum(self.written.values())} records ({written or 'none'})"
        return f"{text}; left out {left_out}" if left_out else text


def convert(
    kind: str,
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = 0,
    on_bad_image: str = "error",
    strict: bool = False,
) -> Conversion:
    """Reads data in a published layout and writes one JSONL file of records.

    Pictures stay where they are: the records hold their absolute paths, or relative ones if they lie below
    the folder of `out`.

    Args:
        kind: a key of `rode.data.readers.READERS`.
        source: the data's folder.
        out: the JSONL file to write; its folder is made, an older file replaced.
        fractions, seed: of `hash_split`, for records without a split of their own.
        on_bad_image: "error", or "skip" to leave such records out and count them.
        strict: stop at the first entry that is broken; else it is left out and counted.

    Raises:
        ValueError: for an unknown kind, a source that is no folder, or `on_bad_image` of another value.
        RecordError, ImageError: for data that cannot be used; names file or record.
    """
    if kind not in READERS:
        raise ValueError(f"kind: expected one of {', '.join(READERS)}, got {kind!r}")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image: expected error or skip, got {on_bad_image!r}")
    source = Path(source)
    if not source.is_dir():
        raise ValueError(f"source: {source} is not a folder")
    written: Counter[str] = Counter()
    log = ReadLog(strict=strict)

    def records() -> Iterator[FoodRecord]:
        for record in READERS[kind](source, log):
            try:
                check_image(record)
            except ImageError:
                if on_bad_image == "error":
                    raise
                log.leave_out("a missing or corrupt image", file=Path(record.image))
                continue
            if record.split is None:
                record = dataclasses.replace(record, split=hash_split(record.id, fractions, seed))
            written[record.split or ""] += 1
            yield record

    write_records(out, records())
    return Conversion(dict(written), dict(log.counts))
