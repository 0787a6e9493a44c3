"""Records with pictures of their own to a folder of shards.

Records of a split are put into the shards in the order of a hash of their ids: sources are often sorted by dish, and training
shuffles a few shards at a time. Each shard is written whole, aside, then renamed; the index comes last. The bytes are a function
of records, pictures and settings, whether or not the writer was killed on its way (Parquet's also of pyarrow's version).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rode_food.atomic import replacing, write_json, write_text
from rode_food.images import ImageError, check_image, open_picture
from rode_food.records import SPLITS, FoodRecord, RecordError, record_from_json, record_line, record_to_json
from rode_food.shards.address import ShardError
from rode_food.shards.formats import ParquetShard, TarShard, import_parquet
from rode_food.shards.index import (
    FORMATS,
    INDEX,
    PICTURE,
    PICTURES,
    SAMPLE,
    SAMPLES,
    VERSION,
    file_digest,
    open_shards,
)
from rode_food.source import hash_split
from rode_food.tasks import FREE_QUESTION, TASKS, make_examples, stable_hash

Map = Callable[
    [Callable[[list[str]], list[str]], Iterable[tuple[str, list[str]]]], Iterable[tuple[str, list[str]]]
]
"""How shards are spread over processes: `rode_food.unifood.stage.Engine.map`."""

BUILDING = "building"
"""Folder in which an unfinished writer keeps what it knows."""


@dataclass(frozen=True)
class Written:
    """The contents of a folder of shards: records by split, files, bytes of the files, (id, reason) of what was left out."""

    records: dict[str, int]
    shards: int
    bytes: int
    left_out: list[tuple[str, str]]

    def __str__(self) -> str:
        splits = ", ".join(f"{count} {split}" for split, count in self.records.items())
        text = f"{sum(self.records.values())} records ({splits or 'none'}) in {self.shards} shards, {self.bytes / 1e6:.1f} MB"
        return (
            f"{text}; left out {len(self.left_out)} with a missing or corrupt image"
            if self.left_out
            else text
        )


def safe_key(id: str) -> str:
    """An id as the name of a tar's members: letters, digits, `_` and `-`, every other byte of its UTF-8 as `%2F`.

    Different ids have different keys. One of more than 80 characters is cut, and ends in `%-` and a hash.
    """
    key = re.sub(rb"[^A-Za-z0-9_-]|^-", lambda byte: b"%%%02X" % byte[0][0], id.encode()).decode()
    return key if len(key) <= 80 else f"{key[:46]}%-{hashlib.sha256(id.encode()).hexdigest()[:32]}"


def write_shards(
    records: Iterable[FoodRecord],
    folder: str | os.PathLike[str],
    *,
    name: str = "records",
    format: str = "webdataset",
    size: int = 1000,
    on_bad_image: str = "error",
    split_fractions: Mapping[str, float] | None = None,
    overwrite: bool = False,
    map: Map | None = None,
) -> Written:
    """Write a folder of shards, or finish one: a killed call is made again with the same arguments.

    Args:
        records: their images absolute; read once.
        folder: for the shards; made if need be.
        name: shards are called NAME-SPLIT-000000.tar or .parquet.
        format: "webdataset" or "parquet".
        size: records of a shard.
        on_bad_image: "error" stops at a picture that is missing or damaged, "skip" leaves its record out and says so.
        split_fractions: see `rode_food.data_mixture.Source`, for records without a split.
        overwrite: replace shards of other records or settings.
        map: how shards are spread over processes; None writes one after the other.

    Raises:
        RecordError, ImageError: for a record that cannot be used, naming it.
        FileExistsError: the folder holds something else.
        OSError: what the system says, a full disk for example; what was finished is kept.
        ValueError, ImportError: settings.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 record in a shard, got {size}")
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image: expected error or skip, got {on_bad_image!r}")
    if format == "parquet":
        import_parquet()
    folder = Path(folder).resolve()
    building = folder / BUILDING
    if folder.exists() and not (folder / INDEX).is_file() and not building.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder}: holds other files and no {INDEX}; name a new folder, or an empty one"
        )
    begun = building.is_dir()
    building.mkdir(parents=True, exist_ok=True)
    try:
        places, digest = _write_lines(records, building / "records.jsonl", split_fractions)
        made_of = hashlib.sha256(json.dumps([VERSION, name, format, size, digest]).encode()).hexdigest()
        finished = _finished(folder, made_of, on_bad_image, overwrite)
    except BaseException:
        if not begun:
            shutil.rmtree(building)
        raise
    if finished is not None:
        shutil.rmtree(building)
        return finished
    parts = list(_parts(places, safe_key(name), size, FORMATS[format]))
    _go_on(building, {"made_of": made_of, "files": [file for file, _ in parts]})

    work = functools.partial(_write_parts, os.fspath(folder), format, on_bad_image)
    done = ((key, work(part)) for key, part in parts) if map is None else map(work, parts)
    entries = sorted((_entry(line) for _, result in done for line in result), key=lambda e: e["file"])
    return _write_index(folder, entries, made_of, format)


def _write_lines(
    records: Iterable[FoodRecord], path: Path, fractions: Mapping[str, float] | None
) -> tuple[dict[str, list[tuple[int, int]]], str]:
    """Write the records as lines with absolute images; (hash of the id, offset) of each by split, and the file's digest."""
    places: dict[str, list[tuple[int, int]]] = {}
    digest, offset = hashlib.sha256(), 0
    seen: set[str] = set()
    with replacing(path, "wb") as out:
        for record in records:
            if record.split is None and fractions is not None:
                record = dataclasses.replace(record, split=hash_split(record.id, fractions))
            if record.split is None:
                raise RecordError(
                    f"record {record.id!r}: split: missing; write one, or give fractions by which to make one"
                )
            for image in record.images:
                if not os.path.isabs(image):
                    raise RecordError(
                        f"record {record.id!r}: image: {image!r} is relative; rode_food.read_records makes it absolute"
                    )
            line = record_line(record, seen).encode() + b"\n"
            out.write(line)
            digest.update(line)
            places.setdefault(record.split, []).append((stable_hash("shard", record.id), offset))
            offset += len(line)
    return places, digest.hexdigest()


def _finished(folder: Path, made_of: str, on_bad_image: str, overwrite: bool) -> Written | None:
    """The finished part that is there already and the same, or None once nothing finished is left."""
    if not (folder / INDEX).is_file():
        return None
    try:
        shards = open_shards(folder)
        complete = on_bad_image == "skip" or not shards.facts["left_out"]
        if shards.facts["made_of"] == made_of and complete:
            return _summary(shards.facts)
    except ShardError:
        if not overwrite:
            raise
    if not overwrite:
        raise FileExistsError(
            f"{folder}: holds shards of other records or settings; name another folder, or overwrite them"
        )
    try:
        names = [shard["file"] for shard in json.loads((folder / INDEX).read_text("utf-8"))["shards"]]
    except (ValueError, KeyError, TypeError):
        names = []
    (folder / INDEX).unlink()  # first: without it there are no shards
    for name in [*names, SAMPLES, PICTURES]:
        (folder / os.path.basename(name)).unlink(missing_ok=True)
    return None


def _go_on(building: Path, plan: dict[str, Any]) -> None:
    """Keep the shards of an unfinished writer of the same records and settings, and no others."""
    folder, path = building.parent, building / "plan.json"
    before = json.loads(path.read_text("utf-8")) if path.is_file() else plan
    if before["made_of"] != plan["made_of"]:
        for file in before["files"]:
            (folder / file).unlink(missing_ok=True)
            (building / f"{file}.json").unlink(missing_ok=True)
    write_text(path, json.dumps(plan))
    for aside in [*folder.glob(".*.tmp"), *building.glob(".*.tmp")]:  # a killed writer's
        aside.unlink()


def _parts(
    places: Mapping[str, list[tuple[int, int]]], name: str, size: int, suffix: str
) -> Iterator[tuple[str, list[str]]]:
    """The plan of what is written: for each shard its file, its split and where its records stand in the lines."""
    for split in SPLITS:
        offsets = [offset for _, offset in sorted(places.get(split, ()))]
        for first in range(0, len(offsets), size):
            file = f"{name}-{split}-{first // size:06d}{suffix}"
            yield (
                file,
                [json.dumps({"file": file, "split": split, "offsets": offsets[first : first + size]})],
            )


def _write_parts(folder: str, format: str, on_bad_image: str, parts: list[str]) -> list[str]:
    return [_write_shard(Path(folder), format, on_bad_image, json.loads(part)) for part in parts]


def _write_shard(folder: Path, format: str, on_bad_image: str, part: Mapping[str, Any]) -> str:
    """One shard and then its entry: what the index will say of it and of its samples, as JSON."""
    path, entry_path = folder / part["file"], folder / BUILDING / f"{part['file']}.json"
    if entry_path.is_file():
        text = entry_path.read_text("utf-8")
        entry = json.loads(text)
        whole = not entry["records"] or (path.is_file() and file_digest(path) == entry["sha256"])
        if whole and (on_bad_image == "skip" or not entry["left_out"]):
            return text
        entry_path.unlink()
    rows: list[tuple[int, list[int], int, int]] = []
    left_out: list[tuple[str, str]] = []
    with replacing(path, "wb") as out:
        shard = (TarShard if format == "webdataset" else ParquetShard)(out)
        try:
            for record in _lines_at(folder / BUILDING / "records.jsonl", part["offsets"]):
                pictures = _pictures(record, on_bad_image, left_out)
                if pictures is not None:
                    obj = record_to_json(record)
                    obj.pop("image", None)
                    line = json.dumps(obj, ensure_ascii=False).encode()
                    shard.add(safe_key(record.id), obj, line, pictures)
                    examples = make_examples(record)
                    answers = dict.fromkeys(TASKS, 0) | {e.task: len(e.answer) for e in examples}
                    turns = [len(e.question) + len(e.answer) for e in examples if e.task == FREE_QUESTION]
                    lengths = [answers[task] for task in TASKS]
                    rows.append((stable_hash("fraction", record.id), lengths, len(turns), sum(turns)))
            places = shard.close()
        except BaseException:
            shard.abandon()
            raise
    entry = {"file": part["file"], "split": part["split"], "records": len(rows)}
    if rows:
        entry |= {"bytes": path.stat().st_size, "sha256": file_digest(path)}
    else:
        path.unlink()
    samples = [[*place.record, place.pictures, *row] for place, row in zip(places, rows, strict=True)]
    text = json.dumps({**entry, "left_out": left_out, "samples": samples}, ensure_ascii=False)
    write_text(entry_path, text)
    return text


def _pictures(record: FoodRecord, on_bad_image: str, left_out: list[tuple[str, str]]) -> list[bytes] | None:
    """The files' bytes, once all have been decoded; None, and a line more in `left_out`, where one cannot be."""
    try:
        check_image(record)
    except ImageError as error:
        if on_bad_image == "error":
            raise
        left_out.append((record.id, str(error)))
        return None
    found = []
    for image in record.images:
        with open_picture(image) as file:
            found.append(file.read())
    return found


def _lines_at(path: Path, offsets: Iterable[int]) -> Iterator[FoodRecord]:
    with path.open("rb") as lines:
        for offset in offsets:
            lines.seek(offset)
            yield record_from_json(json.loads(lines.readline()))


def _entry(line: str) -> dict[str, Any]:
    """The result of `_write_shard`, its samples as arrays: lists of a million would take a gigabyte."""
    entry = json.loads(line)
    rows = []
    more: list[tuple[int, int]] = []
    for offset, size, pictures, rank, answers, *turns in entry["samples"]:
        first = pictures[0] if pictures else (0, 0)
        rows.append(
            (offset, size, *first, max(len(pictures) - 1, 0), len(more), rank, tuple(answers), *turns)
        )
        more += map(tuple, pictures[1:])
    return {**entry, "samples": np.array(rows, SAMPLE), "pictures": np.array(more, PICTURE)}


def _write_index(folder: Path, entries: list[dict[str, Any]], made_of: str, format: str) -> Written:
    samples = np.concatenate([np.empty(0, SAMPLE), *(entry["samples"] for entry in entries)])
    pictures = np.concatenate([np.empty(0, PICTURE), *(entry["pictures"] for entry in entries)])
    # each shard counted its own; the samples stand in the same order
    samples["first_more"] = np.cumsum(samples["more"]) - samples["more"]
    with replacing(folder / SAMPLES, "wb") as out:
        np.save(out, samples)
    if len(pictures):
        with replacing(folder / PICTURES, "wb") as out:
            np.save(out, pictures)
    shards = [
        {key: entry[key] for key in ("file", "split", "records", "bytes", "sha256")}
        for entry in entries
        if entry["records"]
    ]
    facts = {
        "version": VERSION,
        "format": format,
        "made_of": made_of,
        "tasks": TASKS,
        "samples_sha256": file_digest(folder / SAMPLES),
        **({"pictures_sha256": file_digest(folder / PICTURES)} if len(pictures) else {}),
        "left_out": sorted(pair for entry in entries for pair in entry["left_out"]),
        "shards": shards,
    }
    write_json(folder / INDEX, facts)
    shutil.rmtree(folder / BUILDING)
    return _summary(facts)


def _summary(facts: Mapping[str, Any]) -> Written:
    records: Counter[str] = Counter()
    for shard in facts["shards"]:
        records[shard["split"]] += shard["records"]
    return Written(
        {split: records[split] for split in SPLITS if records[split]},
        len(facts["shards"]),
        sum(shard["bytes"] for shard in facts["shards"]),
        [(id, reason) for id, reason in facts["left_out"]],
    )
