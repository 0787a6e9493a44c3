"""The questions of a folder of shards as a sequence that makes each one when it is asked for."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar, cast, overload

import numpy as np

from rode_food.shards.address import ShardError
from rode_food.shards.index import Shards
from rode_food.shards.order import shuffle_blocks
from rode_food.source import Source
from rode_food.tasks import FREE_QUESTION, QUESTIONS, TASKS, Example, make_examples

Item_co = TypeVar("Item_co", bound="Example | tuple[Example, ...]", covariant=True)
"""A question, or a pack of questions about one picture."""


class ShardExamples(Sequence[Item_co]):
    """Examples of one split, the same ones in the same order as those of the records that were written; or packs of them.

    Held are 12 bytes for each; records are read when an example is taken, pictures only through its `image`.

    Args:
        shards: see `open_shards`.
        source: of whose fields tasks, fraction, name and shuffle_shards are used.
        split: "train", "val" or "test"; a fraction is of "train" alone.
        wording, seed: see `rode_food.tasks.make_examples`.

    Attributes:
        lengths: int32, characters of question and answer of each item; that of a question in wording "random" is a mean
            over the wordings, that of a record's own question a mean over its questions.
    """

    def __init__(
        self, shards: Shards, source: Source, split: str, *, wording: str = "first", seed: int = 0
    ) -> None:
        self.shards, self.tasks, self.name = shards, tuple(source.tasks), source.name
        self.wording, self.seed, self.window = wording, seed, source.shuffle_shards
        parts = [
            np.arange(first, first + shard.records)
            for first, shard in zip(shards.first, shards.shards, strict=False)
            if shard.split == split
        ]
        rows = np.concatenate([np.empty(0, np.int64), *parts])
        if split == "train" and source.fraction < 1:
            rows = rows[shards.samples["rank"][rows] / 2.0**64 < source.fraction]
        columns = [column for task in self.tasks for column in self._asked(task, rows)]
        asked = np.stack([times for times, _ in columns] or [np.zeros(len(rows), np.int64)], axis=1)
        sizes = np.stack([size for _, size in columns] or [np.zeros(len(rows), np.int64)], axis=1)
        counts = asked.sum(axis=1)
        self._sample = np.repeat(rows, counts).astype(np.uint32)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        self._first = (np.arange(len(self._sample)) - before).astype(np.uint16)
        self._stop = self._first + np.uint16(1)
        self.lengths = np.repeat(sizes.ravel(), asked.ravel()).astype(np.int32)
        self.packs = False
        self._latest: tuple[int, list[Example]] = (-1, [])

    def _asked(self, task: str, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each wording of a task, by sample: how many questions there are, and the characters of one and its answer."""
        samples = self.shards.samples
        if task == FREE_QUESTION:
            turns = samples["turns"][rows].astype(np.int64)
            yield turns, samples["turns_size"][rows] // np.maximum(turns, 1)
            return
        answers = samples["answers"][rows, TASKS.index(task)].astype(np.int64)
        lengths = [len(text) for text in QUESTIONS[task]]
        mean = round(sum(lengths) / len(lengths))
        for length in {"all": lengths, "random": [mean]}.get(self.wording, lengths[:1]):
            yield (answers > 0).astype(np.int64), answers + length

    def packed(self, most: int) -> ShardExamples[tuple[Example, ...]]:
        """The same questions in tuples of at most `most` about one picture (`rode.vlm.packing.pack_by_picture`)."""
        packs = object.__new__(ShardExamples)
        packs.__dict__.update(self.__dict__)
        # a run of neighbours about one picture ends at another record, and where an example was left out
        fresh = np.ones(len(self), bool)
        fresh[1:] = (np.diff(self._sample) != 0) | (self._first[1:] != self._stop[:-1])
        number = np.arange(len(self))
        begins = (number - np.maximum.accumulate(np.where(fresh, number, 0))) % most == 0
        starts = np.flatnonzero(begins)
        packs._sample, packs._first = self._sample[starts], self._first[starts]
        last = np.append(starts[1:], len(self)) - 1
        packs._stop = self._stop[last]
        packs.lengths = np.add.reduceat(self.lengths, starts) if len(starts) else self.lengths
        packs.packs = True
        return packs

    def without(self, numbers: Sequence[int]) -> ShardExamples[Item_co]:
        """All items but those with these numbers."""
        fewer: ShardExamples[Item_co] = object.__new__(ShardExamples)
        fewer.__dict__.update(self.__dict__)
        for name in ("_sample", "_first", "_stop", "lengths"):
            setattr(fewer, name, np.delete(getattr(self, name), np.asarray(numbers, np.int64)))
        return fewer

    def __len__(self) -> int:
        return len(self._sample)

    @overload
    def __getitem__(self, index: int) -> Item_co: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item_co]: ...
    def __getitem__(self, index: int | slice) -> Item_co | list[Item_co]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        examples = self._asked_of(int(self._sample[index]))
        first, stop = int(self._first[index]), int(self._stop[index])
        if stop > len(examples):
            raise ShardError(
                f"{self.shards.folder}: written by a version that asked other questions; write the shards anew"
            )
        item = tuple(examples[first:stop]) if self.packs else examples[first]
        return cast(Item_co, item)  # `packs` says which of both this is a sequence of

    def _asked_of(self, sample: int) -> list[Example]:
        """All examples of a record, kept until another one is wanted: neighbours share it."""
        latest, examples = self._latest
        if latest != sample:
            record = self.shards.record(sample)
            examples = make_examples(record, self.tasks, wording=self.wording, seed=self.seed)
            if self.name is not None:
                examples = [dataclasses.replace(example, source=self.name) for example in examples]
            self._latest = (sample, examples)
        return examples

    def shuffled(self, generator: random.Random) -> list[int]:
        """Indices of one pass, see `shuffle_blocks`."""
        shard = np.searchsorted(self.shards.first, self._sample, side="right") - 1
        sizes = np.bincount(shard, minlength=len(self.shards.shards))
        return shuffle_blocks(sizes[sizes > 0].tolist(), self.window, generator)
