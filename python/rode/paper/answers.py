"""The answers of a run beside its result, with what each adds to the metrics' sums: for statistics over records."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from rode_food.atomic import replacing
from rode_food.metrics import read_predictions
from rode_food.metrics.sums import Sums, sums_of


class Answer(NamedTuple):
    """One answer to one question; `sums` are those of `rode_food.metrics.sums.sums_of`."""

    record: str
    source: str
    task: str
    text: str
    sums: Sums

    @property
    def group(self) -> str:
        """What was photographed: the part of the record's id before "/", else the whole id."""
        return self.record.partition("/")[0]


def answers_path(result: Path) -> Path:
    """seed-N.answers.jsonl.gz beside seed-N.json."""
    return result.with_name(f"{result.stem}.answers.jsonl.gz")


def keep_answers(predictions: Path, file: Path) -> None:
    """Write the answers of a predictions file, with their sums instead of the truths.

    The same answers make the same bytes. The file is written aside and then renamed.
    """
    text = io.StringIO()
    for row in read_predictions(predictions):
        sums = {name: [float(f"{value:.6g}") for value in values] for name, values in sums_of(row).items()}
        entry = [row["id"], row["source"], row["task"], row["answer"], sums]
        text.write(json.dumps(entry, ensure_ascii=False, separators=(",", ":")) + "\n")
    with replacing(file, "wb") as out:
        out.write(gzip.compress(text.getvalue().encode(), mtime=0))


def read_answers(file: Path) -> list[Answer]:
    """The answers that `keep_answers` wrote.

    Raises:
        ValueError: the file holds something else; names the file.
    """
    try:
        rows: list[list[Any]] = [
            json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()
        ]
        return [
            Answer(record, source, task, text, {name: tuple(values) for name, values in sums.items()})
            for record, source, task, text, sums in rows
        ]
    except (OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{file}: not the answers of a run of `rode reproduce`; move it away") from error
