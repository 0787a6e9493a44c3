"""The order of items in training: a function of seed and epoch alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochSampler(Sampler[int]):
    """The order of items as a function of the epoch alone, so that a resumed run finds its place in any epoch.

    Args:
        plan: epoch -> indices (`rode_food.data_mixture.DataMixture.plan`); as many in every epoch.
        lengths: of the items, to batch like with like: stretches of 50 batches are sorted and cut into batches, and
            the batches of each stretch shuffled: the plan's stretches stay where they were. None keeps the plan's order.
        batch_size: items of one batch of one device.
        seed: of the batches' order.
    """

    def __init__(
        self,
        plan: Callable[[int], list[int]],
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        seed: int = 0,
    ) -> None:
        self.plan, self.lengths, self.batch_size, self.seed, self.epoch = plan, lengths, batch_size, seed, 0
        self.size = len(plan(0))

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        order = self.plan(self.epoch)
        if self.lengths is None:
            return iter(order)
        stretch, generator = 50 * self.batch_size, random.Random(f"{self.seed} {self.epoch}")
        batches: list[list[int]] = []
        for first in range(0, len(order), stretch):
            part = sorted(order[first : first + stretch], key=self.lengths.__getitem__)
            cut = [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
            # Sorted batches in a row would teach short answers first and long ones last. A batch cut short stays last,
            # or those after it would straddle.
            short = [cut.pop()] if len(cut[-1]) < self.batch_size else []
            generator.shuffle(cut)
            batches += [*cut, *short]
        return iter([i for batch in batches for i in batch])


class TellEpoch(TrainerCallback):
    """Tells a sampler its epoch. Trainer and accelerate do so too, but do not reach it through the two wrappers that it has
    on several devices when a run goes on in the middle of an epoch: that epoch would end in the order of the first."""

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
