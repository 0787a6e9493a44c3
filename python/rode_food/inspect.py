"""The contents of a source: counts, samples, pictures that cannot be used, and all that is broken, with file and line."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from rode_food.images import ImageError, decode_picture, wrong_suffix
from rode_food.lines.apply import slash_notes
from rode_food.plausible import doubts
from rode_food.readers import READERS, guess_kind, read_source
from rode_food.readers.file_kind import file_kind
from rode_food.readers.log import MEANINGS, Problem, ReadLog
from rode_food.records import FoodRecord, record_to_json

LISTED = 20
"""Problems of one kind that are listed; all are counted."""
_TOP = 20  # categories printed
_FEW = 3  # entries printed for each reason that is no damage
_LINE = 100  # letters of a sample's value

T = TypeVar("T")


@dataclass
class Inspection:
    """The findings of `inspect`. Everything is counted over all records; lists hold the first `LISTED` of their kind.

    Attributes:
        kind, source: what was read.
        records: how many there are.
        splits, fields, categories: value -> records that have it. A record without a split counts as "none"; a field of
            ingredients counts where one ingredient or more has it.
        ingredients: number of ingredients -> records.
        images: pictures checked by decoding all of each.
        bad_images: number and first of those that cannot be decoded, are missing, or are too large.
        wrong_suffixes: number and first of those whose name promises another format. They decode, so they are used.
        broken, left_out, notes: reason -> entries; what is broken is not counted again as left out.
        problems: the first of each reason, with file and line.
        samples: records as they would be written.
        advice: the next step, for a file.
    """

    kind: str
    source: str
    records: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    ingredients: Counter[int] = field(default_factory=Counter)
    images: int = 0
    bad_images: int = 0
    bad_image_list: list[str] = field(default_factory=list)
    wrong_suffixes: int = 0
    wrong_suffix_list: list[str] = field(default_factory=list)
    broken: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    advice: str = ""

    @property
    def sound(self) -> bool:
        """True if no entry is broken and no picture that was checked is bad."""
        return not self.broken and not self.bad_images

    def to_json(self) -> dict[str, Any]:
        """Plain values; the same that `str` shows."""
        problems = [
            {"reason": p.reason, "file": p.file and str(p.file), "line": p.line, "detail": p.detail}
            for p in self.problems
        ]
        return {
            "kind": self.kind,
            "source": self.source,
            "records": self.records,
            "splits": dict(self.splits),
            "fields": dict(self.fields),
            "categories": dict(self.categories.most_common()),
            "ingredients_per_record": {str(n): count for n, count in sorted(self.ingredients.items())},
            "images": {
                "checked": self.images,
                "bad": self.bad_images,
                "bad_list": self.bad_image_list,
                "wrong_suffix": self.wrong_suffixes,
                "wrong_suffix_list": self.wrong_suffix_list,
            },
            "broken": dict(self.broken),
            "left_out": dict(self.left_out),
            "notes": dict(self.notes),
            "problems": problems,
            "samples": self.samples,
            "advice": self.advice,
            "sound": self.sound,
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.source}: {self.kind}, {self.records:,} records"
        if self.kind not in READERS:
            yield self.advice
            return
        yield from _table("split", self.splits, self.records)
        yield from _table("with", self.fields, self.records)
        if self.categories:
            yield f"categories: {len(self.categories):,}"
            yield from _table("", dict(self.categories.most_common(_TOP)), self.records)
        if self.records:
            low, middle, high = (_quantile(self.ingredients, q) for q in (0.0, 0.5, 1.0))
            yield f"ingredients of a record: {low} to {high}, median {middle}"
        yield (
            f"pictures decoded: {self.images:,}; bad: {self.bad_images:,}; of another format than their name says: "
            + (f"{self.wrong_suffixes:,}")
        )
        yield from _listed(self.bad_image_list, self.bad_images)
        yield from _listed(self.wrong_suffix_list, self.wrong_suffixes)
        for title, counts in (("broken", self.broken), ("left out", self.left_out), ("noted", self.notes)):
            yield f"{title} ({MEANINGS[title]}): {counts.total():,}"
            for reason, count in counts.most_common():
                yield f"  {count:,} x {reason}"
                listed = [str(problem) for problem in self.problems if problem.reason == reason]
                yield from _listed(listed if title == "broken" else listed[:_FEW], count, "    ")
        for sample in self.samples:
            yield "sample:"
            for name, value in sample.items():
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                yield f"  {name}: {text if len(text) <= _LINE else text[: _LINE - 3] + '...'}"
        if self.advice:
            yield f"to convert: {self.advice}"


def inspect(
    source: str | os.PathLike[str],
    kind: str | None = None,
    *,
    samples: int = 3,
    images: int | Literal["all"] = 100,
    seed: int = 0,
    **options: bool | int | str,
) -> Inspection:
    """Reads a source to its end; writes nothing, but for pictures that stand in the data itself: to a temporary folder.

    Args:
        source: a folder in a publisher's layout, or a file of records.
        kind: a key of `rode_food.readers.READERS`; None to go by the files that are there.
        samples: records to show, drawn from all by `seed`.
        images: pictures to decode, drawn from all by `seed`; "all" for each of them.
        options: of the reader.

    Raises:
        ValueError: no layout is recognised; see `read_source`.
        RecordError: a file that the layout needs is missing or is none of its kind.
    """
    advice = ""
    if kind is None and Path(source).is_file():
        what = file_kind(source)
        if what.reader is None:
            return Inspection(what.name, str(source), advice=what.advice)
        kind, advice = what.reader, what.advice
    kind = guess_kind(source) if kind is None else kind
    found = Inspection(kind, str(source), advice=advice)
    log = ReadLog(keep=LISTED)
    chosen: list[FoodRecord] = []
    pictures: list[str] = []
    draws = random.Random(seed), random.Random(seed + 1)

    with tempfile.TemporaryDirectory(prefix="rode-inspect-") as embedded:

        def read() -> Iterator[FoodRecord]:
            for record in read_source(kind, source, log, pictures=embedded, **options):
                _count(found, record)
                for reason, told in doubts(record):
                    log.note(reason, detail=f"record {record.id!r}: {told}")
                for ingredient in record.ingredients:
                    for note in slash_notes(ingredient.text or ""):
                        log.note(note.partition(":")[0], detail=f"record {record.id!r}: {ingredient.text}")
                _draw(chosen, record, samples, found.records, draws[0])
                yield record

        if images == "all":
            _check(found, (image for record in read() for image in record.images))
        else:
            seen = 0
            for record in read():
                for image in record.images:
                    seen += 1
                    _draw(pictures, image, images, seen, draws[1])
            _check(found, pictures)
    found.samples = [record_to_json(record) for record in chosen]
    found.broken, found.notes = log.broken, log.notes
    found.left_out = log.counts - log.broken
    found.problems = log.problems + log.noted
    return found


def _count(found: Inspection, record: FoodRecord) -> None:
    found.records += 1
    found.splits[record.split or "none"] += 1
    found.ingredients[len(record.ingredients)] += 1
    if record.category:
        found.categories[record.category] += 1
    found.fields["no picture"] += not record.images
    found.fields["several pictures"] += bool(record.more_images)
    for name in ("title", "category", "ingredients", "instructions", "nutrition", "conversation"):
        found.fields[name] += bool(getattr(record, name))
    found.fields["all five of nutrition"] += bool(record.nutrition and record.nutrition.complete)
    for name in ("text", "amount", "mass", "nutrition"):
        found.fields[f"ingredients.{name}"] += any(getattr(i, name) is not None for i in record.ingredients)


def _draw(into: list[T], item: T, size: int, seen: int, draw: random.Random) -> None:
    """Reservoir sampling: each of the `seen` items so far is in with equal probability."""
    if len(into) < size:
        into.append(item)
    elif size and (place := draw.randrange(seen)) < size:
        into[place] = item


def _check(found: Inspection, paths: Iterable[str]) -> None:
    for path, problem, promised in _decoded(paths):
        found.images += 1
        if problem:
            found.bad_images += 1
            if found.bad_images <= LISTED:
                found.bad_image_list.append(problem)
        elif promised:
            found.wrong_suffixes += 1
            if found.wrong_suffixes <= LISTED:
                found.wrong_suffix_list.append(f"image {path} is no {promised}")


def _decoded(paths: Iterable[str]) -> Iterator[tuple[str, str | None, str | None]]:
    """(path, what is wrong with it, format that its name wrongly promises), in order; a few at a time in threads."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[Future[tuple[str, str | None, str | None]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for path in paths:
            waiting.append(pool.submit(_decode, path))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _decode(path: str) -> tuple[str, str | None, str | None]:
    try:
        return path, None, wrong_suffix(path, decode_picture(path).format or "")
    except ImageError as error:
        return path, str(error), None


def _table(title: str, counts: dict[str, int], of: int) -> Iterator[str]:
    for name, count in counts.items():
        yield f"  {f'{title} {name}'.strip():32} {count:>10,} {count / of if of else 0.0:7.1%}"


def _listed(items: list[str], count: int, indent: str = "  ") -> Iterator[str]:
    for item in items:
        yield f"{indent}{item}"
    if count > len(items):
        yield f"{indent}... and {count - len(items):,} more"


def _quantile(counts: Counter[int], q: float) -> int:
    rank = q * (counts.total() - 1)
    for value in sorted(counts):
        rank -= counts[value]
        if rank < 0:
            return value
    return max(counts)
