"""Examples as a sequence that makes each one when it is asked for: what is held is where its record stands."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self, TypeVar, cast, overload

import numpy as np

from rode_food.records import FoodRecord
from rode_food.source import Source
from rode_food.tasks import Example, make_examples

Item_co = TypeVar("Item_co", bound="Example | tuple[Example, ...]", covariant=True)
"""A question, or a pack of questions about one picture."""


class LazyExamples(Sequence[Item_co], ABC):
    """Examples of one split of a source; each is made from its record when it is taken.

    Args:
        source: of whose fields tasks and name are used here.
        wording, seed: see `rode_food.tasks.make_examples`.

    Attributes:
        lengths: int32, characters of question and answer of each item.
        packs: items are tuples of examples.
    """

    lengths: np.ndarray
    _columns: tuple[str, ...] = ("_record", "_first", "_stop", "lengths")
    """Names of the arrays that have an entry for each item."""

    def __init__(self, source: Source, wording: str, seed: int) -> None:
        self.tasks, self.name = tuple(source.tasks), source.name
        self.wording, self.seed = wording, seed
        self.packs = False
        self._record = self._first = self._stop = np.empty(0, np.uint32)
        self._latest: tuple[int, list[Example]] = (-1, [])

    @abstractmethod
    def record(self, number: int) -> FoodRecord:
        """The record of a number, with its split and absolute paths of pictures."""

    @abstractmethod
    def _changed(self) -> Exception:
        """The error for a record that no longer has the examples that it had."""

    def without(self, numbers: Sequence[int]) -> Self:
        """All items but those with these numbers."""
        fewer = object.__new__(type(self))
        fewer.__dict__.update(self.__dict__)
        for name in self._columns:
            setattr(fewer, name, np.delete(getattr(self, name), np.asarray(numbers, np.int64)))
        return fewer

    def __len__(self) -> int:
        return len(self._record)

    @overload
    def __getitem__(self, index: int) -> Item_co: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item_co]: ...
    def __getitem__(self, index: int | slice) -> Item_co | list[Item_co]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        examples = self._asked_of(int(self._record[index]))
        first, stop = int(self._first[index]), int(self._stop[index])
        if stop > len(examples):
            raise self._changed()
        item = tuple(examples[first:stop]) if self.packs else examples[first]
        return cast(Item_co, item)  # `packs` says which of both this is a sequence of

    def _asked_of(self, number: int) -> list[Example]:
        """All examples of a record, kept until another one is wanted: neighbours share it."""
        latest, examples = self._latest
        if latest != number:
            examples = examples_of(self.record(number), self.tasks, self.wording, self.seed, self.name)
            self._latest = (number, examples)
        return examples


def examples_of(
    record: FoodRecord, tasks: Sequence[str], wording: str, seed: int, name: str | None
) -> list[Example]:
    """A record's examples, under a source's name where it has one (`rode_food.source.Source`)."""
    examples = make_examples(record, tasks, wording=wording, seed=seed)
    if name is not None:
        examples = [dataclasses.replace(example, source=name) for example in examples]
    return examples
