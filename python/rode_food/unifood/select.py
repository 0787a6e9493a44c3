"""Stage select: from the sources' records to a balanced sample without pictures that stand in two splits.

The sources are read once, in a stream, into `candidates.jsonl`. Each split gives records in the proportion in which it
has them; within a split the categories take turns, so that rare ones are taken whole before a frequent one gives its
second hundred. Pictures are decoded and hashed in that order until enough are found.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rode_food.atomic import replacing, write_json
from rode_food.images import ImageError
from rode_food.lines.apply import why_simple, with_readings
from rode_food.progress import Progress
from rode_food.readers import read_source
from rode_food.readers.log import ReadLog
from rode_food.records import SPLITS, FoodRecord, record_from_json, record_to_json, write_records
from rode_food.source import hash_split
from rode_food.tasks import stable_hash
from rode_food.unifood.categories import Categories
from rode_food.unifood.near import near_any
from rode_food.unifood.stage import Stage

_FILES = ("candidates.jsonl", "candidates.npz", "categories.json", "candidates.json")


@dataclass(frozen=True)
class _Candidates:
    """All records that could be taken, by number. The records themselves stay in the file.

    Attributes:
        offset: int64 (n + 1,), byte at which each line begins.
        split: int8 (n,), index into SPLITS.
        category: int32 (n,), -1 for none.
        hash: uint64 (n,), of seed and id: the order in which records of one category are taken.
    """

    path: Path
    offset: np.ndarray
    split: np.ndarray
    category: np.ndarray
    hash: np.ndarray

    def lines(self, numbers: np.ndarray) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for number in numbers:
                file.seek(self.offset[number])
                yield file.read(self.offset[number + 1] - self.offset[number])


def run(stage: Stage) -> dict[str, Any]:
    """Writes `output`, `categories.json` and `problems.txt`; see the module."""
    settings = stage.settings.select
    candidates, read = _read(stage)
    order = _order(candidates)
    hashes = np.zeros(len(order), dtype=np.uint64)
    usable = np.zeros(len(order), dtype=bool)
    bad: list[str] = []
    taken = turn = 0
    kept = twins = order[:0]
    while len(kept) < settings.size and taken < len(order):
        batch = order[taken : taken + settings.size - len(kept)]
        found = stage.in_parts(f"hashes-{turn}", hash_pictures, _pictures(candidates, batch))
        for number, line in zip(batch, found, strict=True):
            answer = json.loads(line)
            usable[number] = "hash" in answer
            if usable[number]:
                hashes[number] = int(answer["hash"], 16)
            elif settings.on_bad_image == "error":
                raise ImageError(answer["error"])
            else:
                bad.append(answer["error"])
        taken, turn = taken + len(batch), turn + 1
        seen = order[:taken]
        kept, twins = _apart(candidates, seen[usable[seen]], hashes, settings.near_duplicate_bits)
    kept = np.sort(kept)

    splits: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    names = ["none", *Categories.load(stage.folder / "categories.json").names.values()]

    bad_pictures = len(bad)
    doubts: Counter[str] = Counter()

    def records() -> Iterator[FoodRecord]:
        # names and amounts matter from here on: the readers' first reading of each line gives way to the library's
        lines = (line.decode().rstrip("\n") for line in candidates.lines(kept))
        for number, row in zip(kept, stage.in_parts("lines", with_readings, lines), strict=True):
            answer = json.loads(row)
            record = record_from_json(answer["record"])
            doubts.update(note.partition(":")[0] for note in answer["notes"])
            bad.extend(f"record {record.id!r}: {note}" for note in answer["notes"][:1])
            splits[record.split or ""] += 1
            # a category of the source's own has no number below
            known = candidates.category[number] + 1
            categories[record.category or names[known if known < len(names) else 0]] += 1
            yield record

    write_records(stage.output, records())
    stage.drop_parts("lines")
    with replacing(stage.folder / "problems.txt") as out:
        out.writelines(f"{line}\n" for line in [*read["problems"], *bad])
    for done in range(turn):
        stage.drop_parts(f"hashes-{done}")
    return {
        "read": read["read"],
        "left_out": read["left_out"],
        "candidates": len(order),
        "pictures_checked": taken,
        "bad_pictures": bad_pictures,
        "near_duplicates": len(twins),
        "records": len(kept),
        "noted": read.get("noted", {}) | dict(doubts),
        **({} if why_simple() is None else {"lines": why_simple()}),
        "splits": {split: splits[split] for split in SPLITS},
        "categories": len(categories),
        "largest_categories": dict(categories.most_common(5)),
    }


def _read(stage: Stage) -> tuple[_Candidates, dict[str, Any]]:
    """Reads the sources, or what an earlier call made of them."""
    data, arrays, names, done = (stage.folder / name for name in _FILES)
    report = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
    if report.get("key") != stage.key:
        log = ReadLog()
        report = {"key": stage.key, "read": 0}
        splits: list[int] = []
        hashes: list[int] = []
        offsets = [0]
        with replacing(data, "wb") as out:

            def titles() -> Iterator[str]:
                for record in _eligible(stage, log, report):
                    line = json.dumps(record_to_json(record), ensure_ascii=False).encode() + b"\n"
                    out.write(line)
                    offsets.append(offsets[-1] + len(line))
                    splits.append(SPLITS.index(record.split or ""))
                    hashes.append(stable_hash(stage.settings.select.seed, "select", record.id))
                    if record.split == "train" and record.title:
                        yield record.title

            options = stage.settings.categorise
            categories = Categories.fit(titles(), options.size, options.min_count)
        categories.save(names)
        with replacing(arrays, "wb") as out:
            np.savez(
                out,
                offset=np.array(offsets, dtype=np.int64),
                split=np.array(splits, dtype=np.int8),
                category=np.fromiter(_categories(data, categories), dtype=np.int32, count=len(splits)),
                hash=np.array(hashes, dtype=np.uint64),
            )
        report |= {
            "left_out": dict(log.counts),
            "noted": dict(log.notes),
            "problems": list(map(str, log.problems)),
        }
        write_json(done, report)  # last: from now on the rest is whole
    with np.load(arrays) as loaded:
        return _Candidates(data, **loaded), report


def _eligible(stage: Stage, log: ReadLog, report: dict[str, Any]) -> Iterator[FoodRecord]:
    settings = stage.settings.select
    seen: set[int] = set()
    for source in stage.settings.sources:
        records = read_source(source.kind, source.path, log, **source.options)
        for record in Progress(records, desc=f"reading {source.path}", unit="record", show=stage.progress):
            report["read"] += 1
            if not settings.min_ingredients <= len(record.ingredients) <= settings.max_ingredients:
                log.leave_out("too few or too many ingredients")
                continue
            id_hash = stable_hash(record.id)
            if id_hash in seen:
                log.leave_out("an id that another source has as well", detail=record.id)
                continue
            seen.add(id_hash)
            split = record.split or hash_split(record.id, settings.split_fractions)
            yield dataclasses.replace(record, split=split, source=stage.settings.name)


def _categories(data: Path, categories: Categories) -> Iterator[int]:
    """Numbers of the candidates' categories; those that a source states itself come after the fitted ones."""
    numbers = {name: i for i, name in enumerate(categories.names.values())}
    with data.open("rb") as lines:
        for line in lines:
            record = json.loads(line)
            name = record.get("category") or categories.of(record.get("title"))
            yield -1 if name is None else numbers.setdefault(name, len(numbers))


def _order(candidates: _Candidates) -> np.ndarray:
    """Candidates in the order in which they are taken: int64 (n,).

    Every beginning of it has the splits in their proportion and, within each, the categories as equal as they can be.
    """
    n = len(candidates.split)
    split, category, hashes = candidates.split, candidates.category, candidates.hash
    turn = np.empty(n, dtype=np.int64)  # 0 for the first of its category and split, 1 for the second, ...
    grouped = np.lexsort((hashes, category, split))
    new = np.ones(n, dtype=bool)
    new[1:] = (np.diff(split[grouped]) != 0) | (np.diff(category[grouped]) != 0)
    first = np.maximum.accumulate(np.where(new, np.arange(n), 0))
    turn[grouped] = np.arange(n) - first
    position = np.empty(n)
    for number in range(len(SPLITS)):
        members = np.flatnonzero(split == number)
        members = members[np.lexsort((hashes[members], turn[members]))]
        position[members] = (np.arange(len(members)) + 0.5) / max(len(members), 1)
    return np.lexsort((hashes, position))


def _pictures(candidates: _Candidates, numbers: np.ndarray) -> Iterator[str]:
    for line in candidates.lines(numbers):
        record = record_from_json(json.loads(line))
        yield json.dumps([record.id, record.image])


def hash_pictures(lines: list[str]) -> list[str]:
    """Decodes each picture: {"hash": 16 hexadecimal digits} of its perceptual hash (DCT, 64 bits), or {"error": why not}."""
    try:
        import imagehash
    except ImportError as error:
        raise ImportError(
            "near-duplicate pictures are found by ImageHash, which is not installed: pip install 'rode[data]'"
        ) from error
    from rode_food.images import decode_picture, to_rgb

    rows = []
    for line in lines:
        record_id, path = json.loads(line)
        try:
            if not path:
                raise ImageError("no picture")
            # the hash looks at 32 x 32 pixels: a JPEG may decode at an eighth of its size, all of its data is read still
            image = to_rgb(decode_picture(path, smallest_side=128))
            rows.append({"hash": str(imagehash.phash(image))})
        except ImageError as error:
            rows.append({"error": f"record {record_id!r}: {error}"})
    return [json.dumps(row) for row in rows]


def _apart(
    candidates: _Candidates, numbers: np.ndarray, hashes: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    """(kept, dropped): no picture of val is in test, none of train in either. Test keeps all, so that a larger training
    set does not change it."""
    kept = numbers[:0]
    dropped = numbers[:0]
    for split in reversed(range(len(SPLITS))):
        members = numbers[candidates.split[numbers] == split]
        twin = near_any(hashes[members], hashes[kept], bits) >= 0
        kept = np.concatenate([kept, members[~twin]])
        dropped = np.concatenate([dropped, members[twin]])
    return kept, dropped
