"""One source of records: its file or folder, its weight, and which of its records stand in which split."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rode_food.records import SPLITS
from rode_food.tasks import ALL_TASKS, stable_hash


@dataclass(frozen=True)
class Source:
    """One file of records, or one folder of shards.

    Attributes:
        path: JSONL file, see `docs/records.md`, or a folder, see `docs/shards.md`.
        name: by which metrics are kept apart; None for the `source` that each record states.
        weight: passes over this source's examples per epoch: 1 each once, 0.5 half of them (the other half
            in the next epoch), 3 each three times, 0 leaves the source out.
        fraction: share of the training records to use, in (0, 1]: a hash of the id decides, so that a smaller share is part of a
            larger one. Other splits are whole.
        tasks: which questions to ask.
        split_fractions: {"train": 0.8, "val": 0.1, "test": 0.1}, for records that state no split
            (`hash_split` with seed 0, so that it never moves with a training seed); None: such a record is
            an error.
        shuffle_shards: so many shards are shuffled together, see `rode_food.shards.order`; a file is shuffled as a whole.
    """

    path: str
    name: str | None = None
    weight: float = 1.0
    tasks: Sequence[str] = ALL_TASKS
    split_fractions: Mapping[str, float] | None = None
    fraction: float = 1.0
    shuffle_shards: int = 16

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight of {self.path}: expected a finite number >= 0, got {self.weight!r}")
        if not 0 < self.fraction <= 1:
            raise ValueError(
                f"fraction of {self.path}: expected more than 0 and at most 1, got {self.fraction!r}; weight 0 leaves it out"
            )
        if self.shuffle_shards < 1:
            raise ValueError(f"shuffle_shards of {self.path}: expected at least 1, got {self.shuffle_shards}")
        if self.name == "all":
            raise ValueError('name: "all" stands for all sources together in the metrics; choose another')
        for task in self.tasks:
            if task not in ALL_TASKS:
                raise ValueError(
                    f"tasks of {self.path}: expected some of {', '.join(ALL_TASKS)}, got {task!r}"
                )
        if self.split_fractions is not None:
            check_fractions(self.split_fractions)


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raises ValueError for shares of splits that are not in [0, 1] or do not sum to 1."""
    for split, share in fractions.items():
        if split not in SPLITS:
            raise ValueError(f"split fractions: expected some of {', '.join(SPLITS)}, got {split!r}")
        if not 0 <= share <= 1:
            raise ValueError(f"split fractions: {split}: expected 0 to 1, got {share!r}")
    total = sum(fractions.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"split fractions: expected a sum of 1, got {total:g}")


def hash_split(id: str, fractions: Mapping[str, float], seed: int = 0) -> str:
    """The split of a record by the hash of its id: adding records never moves another one.

    Args:
        id: the record's id.
        fractions: share of each split, summing to 1; a split left out gets none.
        seed: another seed, another split.
    """
    check_fractions(fractions)
    point = stable_hash(seed, id, "split") / 2**64
    present = [split for split in SPLITS if fractions.get(split)]
    for split in present:
        point -= fractions[split]
        if point < 0:
            return split
    return present[-1]  # the shares' sum may fall short of 1 by rounding


def within_fraction(id: str, fraction: float) -> bool:
    """Whether a record is among the first `fraction` of all in the order of a hash of their ids."""
    return stable_hash("fraction", id) / 2**64 < fraction or fraction == 1
