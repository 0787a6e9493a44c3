"""The questions of a folder of shards as a sequence that makes each one when it is asked for."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from rode_food.lazy_examples import Item_co, LazyExamples
from rode_food.records import FoodRecord
from rode_food.shards.address import ShardError
from rode_food.shards.index import Shards
from rode_food.shards.order import shuffle_blocks
from rode_food.source import Source
from rode_food.tasks import FREE_QUESTION, QUESTIONS, TASKS, Example


class ShardExamples(LazyExamples[Item_co]):
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
        super().__init__(source, wording, seed)
        self.shards, self.window = shards, source.shuffle_shards
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
        self._record = np.repeat(rows, counts).astype(np.uint32)
        before = np.repeat(np.cumsum(counts) - counts, counts)
        self._first = (np.arange(len(self._record)) - before).astype(np.uint16)
        self._stop = self._first + np.uint16(1)
        self.lengths = np.repeat(sizes.ravel(), asked.ravel()).astype(np.int32)

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
        fresh[1:] = (np.diff(self._record) != 0) | (self._first[1:] != self._stop[:-1])
        number = np.arange(len(self))
        begins = (number - np.maximum.accumulate(np.where(fresh, number, 0))) % most == 0
        starts = np.flatnonzero(begins)
        packs._record, packs._first = self._record[starts], self._first[starts]
        last = np.append(starts[1:], len(self)) - 1
        packs._stop = self._stop[last]
        packs.lengths = np.add.reduceat(self.lengths, starts) if len(starts) else self.lengths
        packs.packs = True
        return packs

    def record(self, number: int) -> FoodRecord:
        return self.shards.record(number)

    def _changed(self) -> ShardError:
        return ShardError(
            f"{self.shards.folder}: written by a version that asked other questions; write the shards anew"
        )

    def shuffled(self, generator: random.Random) -> list[int]:
        """Indices of one pass, see `shuffle_blocks`."""
        shard = np.searchsorted(self.shards.first, self._record, side="right") - 1
        sizes = np.bincount(shard, minlength=len(self.shards.shards))
        return shuffle_blocks(sizes[sizes > 0].tolist(), self.window, generator)
