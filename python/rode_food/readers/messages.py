"""Rows with `messages` and images: JSON lines, Parquet files, and folders of `datasets.save_to_disk`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.readers.conversations import Row, Rows
from rode_food.readers.json_rows import read_json_rows
from rode_food.readers.log import ReadLog
from rode_food.readers.picture_files import PictureFiles
from rode_food.records import FoodRecord, RecordError

_BATCH = 32  # rows of Parquet and Arrow that are held at once, with their pictures
_SPLIT = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val", "test": "test"}
_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz")


def read(source: Path, log: ReadLog, pictures: Path, image_folder: str = "") -> Iterator[FoodRecord]:
    """The rows of a file, or of all files of a folder, as records.

    Args:
        source: JSON lines, a JSON array, a Parquet file, a folder of these, or one that `datasets` saved.
        log: is told.
        pictures: folder for pictures that have no file: those in Parquet, Arrow and data URLs.
        image_folder: the folder to which pictures' paths are relative; the data's own by default.

    Raises:
        RecordError: a folder without such files, or a damaged one.
        ImportError: Parquet or Arrow without pyarrow.
    """
    folder = source if source.is_dir() else source.parent
    files = PictureFiles(Path(image_folder) if image_folder else folder, pictures)
    name = source.name if source.is_dir() else source.name.partition(".")[0]
    yield from Rows(name, files, log).records(_rows(source, log), "messages")


def _rows(source: Path, log: ReadLog) -> Iterator[Row]:
    number = 0
    for file, split in _files(source):
        for line, value in _values(file, log):
            yield Row(number, file, line, split, value)
            number += 1


def _files(source: Path) -> Iterator[tuple[Path, str | None]]:
    """(file, the split that a folder's layout implies)."""
    if source.is_file():
        yield source, None
        return
    if (source / "dataset_dict.json").is_file():
        for name in _json(source / "dataset_dict.json")["splits"]:
            for file, _ in _files(source / name):
                yield file, _SPLIT.get(name)
        return
    if (source / "state.json").is_file():
        for entry in _json(source / "state.json")["_data_files"]:
            yield source / entry["filename"], None
        return
    found = sorted(file for file in source.rglob("*") if file.name.endswith(_SUFFIXES) and file.is_file())
    if not found:
        raise RecordError(f"{source}: holds neither state.json nor files that end in {', '.join(_SUFFIXES)}")
    for file in found:
        yield file, _SPLIT.get(re.split(r"[-_.]", file.name)[0])


def _json(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecordError(f"{path}: damaged ({error}); copy it again") from None
    return value


def _values(file: Path, log: ReadLog) -> Iterator[tuple[int | None, dict[str, Any]]]:
    with file.open("rb") as start:
        head = start.read(4)
    if head != b"PAR1" and file.suffix != ".arrow":
        yield from read_json_rows(file, log, "messages")
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"{file} is read by pyarrow: pip install 'rode[data]'") from error
    try:
        if head == b"PAR1":
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(_BATCH):
                for value in batch.to_pylist():
                    yield None, value
            return
        with pyarrow.memory_map(str(file)) as mapped, pyarrow.ipc.open_stream(mapped) as batches:
            for batch in batches:
                for first in range(0, batch.num_rows, _BATCH):
                    for value in batch.slice(first, _BATCH).to_pylist():
                        yield None, value
    except pyarrow.ArrowException as error:
        raise RecordError(f"{file}: damaged ({' '.join(str(error).split())}); copy it again") from None
