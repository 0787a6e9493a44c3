"""Several sources of records as one stream of examples, each with its weight and its name."""

from __future__ import annotations

import bisect
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Generic, Protocol, TypeVar, overload, runtime_checkable

from rode_food.opening import GZIP
from rode_food.records import SPLITS, read_records
from rode_food.source import Source
from rode_food.tasks import Example, stable_hash

INDEXED_FROM = 64 * 2**20
"""Bytes: the examples of a smaller file are held, those of one that is as large or larger are made when they are taken."""
T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@runtime_checkable
class Shuffling(Protocol):
    """A sequence that likes to be read in an order of its own: a folder of shards."""

    def shuffled(self, generator: random.Random) -> list[int]:
        """Indices of one pass over all items."""
        ...


class Joined(Sequence[T_co]):
    """Sequences one after the other, without copying them: some make their items only when asked.

    Attributes:
        parts: the sequences.
    """

    def __init__(self, parts: Iterable[Sequence[T_co]]) -> None:
        self.parts = list(parts)
        self._ends = list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> list[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | list[T_co]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part][index - self._ends[part]]  # negative, so from the part's end


@dataclass(frozen=True)
class DataMixture(Generic[T_co]):
    """The examples of all sources and the plan by which an epoch draws from them.

    Attributes:
        examples: source by source, each in its file's order; `Joined` where one of them makes its examples when asked.
        counts: how many of them each source has.
        weights: passes per epoch of each source.
        seed: of the plan.
    """

    examples: Sequence[T_co]
    counts: list[int]
    weights: list[float]
    seed: int = 0

    def parts(self) -> list[Sequence[T_co]]:
        """The examples of each source."""
        if isinstance(self.examples, Joined):
            return self.examples.parts
        return [
            self.examples[end - count : end]
            for end, count in zip(accumulate(self.counts), self.counts, strict=True)
        ]

    def with_parts(self, parts: Sequence[Sequence[T]]) -> DataMixture[T]:
        """The same plan for other examples, again one sequence for each source."""
        return DataMixture(_join(parts), list(map(len, parts)), self.weights, self.seed)

    def __len__(self) -> int:
        """Examples in one epoch."""
        return sum(self._draws())

    def _draws(self) -> list[int]:
        return [round(weight * count) for weight, count in zip(self.weights, self.counts, strict=True)]

    def plan(self, epoch: int = 0) -> list[int]:
        """Indices into `examples` for one epoch, shuffled; a function of (seed, epoch) alone.

        Each source is an endless row of shuffled passes over its examples, and each epoch takes the next
        `weight * count` of them: no example comes up twice more often than another. Shards are shuffled a few at a time
        (`rode_food.shards.order`); where a source has some, sources take turns at random and each keeps its own order.
        """
        drawn: list[list[int]] = []
        parts = self.parts()
        first = 0
        for number, (part, count, draw) in enumerate(zip(parts, self.counts, self._draws(), strict=True)):
            indices: list[int] = []
            position, stop = epoch * draw, (epoch + 1) * draw
            while position < stop:
                turn, offset = divmod(position, count)
                generator = random.Random(stable_hash(self.seed, "pass", number, turn))
                order = _pass(part, count, generator)
                taken = order[offset : offset + stop - position]
                indices += [first + index for index in taken]
                position += len(taken)
            drawn.append(indices)
            first += count
        generator = random.Random(stable_hash(self.seed, "epoch", epoch))
        if any(isinstance(part, Shuffling) for part in parts):
            turns = [number for number, indices in enumerate(drawn) for _ in indices]
            generator.shuffle(turns)
            following = list(map(iter, drawn))
            return [next(following[number]) for number in turns]
        indices = [index for part in drawn for index in part]
        generator.shuffle(indices)
        return indices


def _pass(part: Sequence[object], count: int, generator: random.Random) -> list[int]:
    """All examples of a source once: in the order in which its shards like to be read, else in any."""
    if isinstance(part, Shuffling):
        return part.shuffled(generator)
    order = list(range(count))
    generator.shuffle(order)
    return order


def _join(parts: Sequence[Sequence[T]]) -> Sequence[T]:
    if all(isinstance(part, list) for part in parts):
        return [example for part in parts for example in part]
    return Joined(parts)


def load_examples(
    sources: Iterable[Source], split: str, *, wording: str = "first", seed: int = 0
) -> DataMixture[Example]:
    """Reads the records of one split and asks each its questions. Those in shards, and in a file of at least `INDEXED_FROM` bytes
    that is not gzip'ed, are read again when their example is taken.

    Args:
        sources: see `Source`; one of weight 0 is not read.
        split: "train", "val" or "test".
        wording: see `rode_food.tasks.make_examples`.
        seed: of the wording and of the epochs' order.

    Raises:
        RecordError: for a record that does not fit the schema, or has no split where none is made.
        ValueError: if the split is empty: in training for any one source, else for all of them together.
        OSError: for a file that cannot be read, and a shard that is missing or not of its full size.
    """
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    parts: list[Sequence[Example]] = []
    weights, paths = [], []
    for source in sources:
        if source.weight == 0:
            continue
        parts.append(_examples(source, split, wording, seed))
        weights.append(source.weight)
        paths.append(str(source.path))
        if split == "train" and not parts[-1]:
            part = "" if source.fraction == 1 else f" in a fraction of {source.fraction:g}"
            mend = (
                "weight 0 or other tasks"
                if source.fraction == 1
                else "a larger fraction, weight 0 or other tasks"
            )
            raise ValueError(
                f"{source.path}: no example of split 'train' for {', '.join(source.tasks)}{part}; give it {mend}"
            )
    if not any(parts):
        raise ValueError(f"no example of split {split!r} in {', '.join(paths) or 'no sources'}")
    return DataMixture(_join(parts), list(map(len, parts)), weights, seed)


def _examples(source: Source, split: str, wording: str, seed: int) -> Sequence[Example]:
    # numpy is imported by who reads examples, not with this package
    from rode_food.lazy_examples import examples_of
    from rode_food.record_scan import Scan

    if Path(source.path).is_dir():
        from rode_food.shards.examples import ShardExamples
        from rode_food.shards.index import open_shards

        return ShardExamples(open_shards(source.path), source, split, wording=wording, seed=seed)
    scan = Scan(source, split, wording, seed)
    if _is_large(source.path):
        from rode_food.file_examples import FileExamples

        return FileExamples(scan)
    examples: list[Example] = []
    for record in read_records(source.path):
        kept = scan.kept(record)
        if kept is not None:
            examples += examples_of(kept, source.tasks, wording, seed, source.name)
    return examples


def _is_large(path: str) -> bool:
    """Whether a file is read at each record's place: one that is gzip'ed has no such places."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_size >= INDEXED_FROM and file.read(2) != GZIP
