"""A packed mixture of LoRA experts: ranks, scaling and packing.

Packing: experts stand one after another. Expert i owns rows `offsets[i]:offsets[i + 1]` of `A` (R, K) and the same
columns of `B` (O, R), with R = sum(ranks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from numbers import Integral, Real

import torch


@dataclass(frozen=True)
class Mixture:
    """Static description of a packed mixture.

    Attributes:
        ranks: rank of each expert.
        scaling: factor of each expert (alpha / r_i in the paper), before dropout's 1 / (1 - p).
    """

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]

    @property
    def num_experts(self) -> int:
        return len(self.ranks)

    @property
    def total_rank(self) -> int:
        return sum(self.ranks)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First row of each expert in A, and R as the last entry."""
        return tuple(accumulate(self.ranks, initial=0))

    def scaling_with_dropout(self, dropout_p: float) -> tuple[float, ...]:
        """The scaling with 1 / (1 - p) folded in; at p = 1 everything is dropped and the factor is 0."""
        keep = 1.0 - dropout_p
        return tuple(s / keep if keep > 0.0 else 0.0 for s in self.scaling)


def _rank(i: int, rank: object) -> int:
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        raise TypeError(f"ranks[{i}]: expected an int, got {rank!r} ({type(rank).__name__})")
    if rank < 1:
        raise ValueError(f"ranks[{i}]: expected a rank of at least 1, got {rank}")
    return int(rank)


def _factor(i: int, factor: object) -> float:
    if isinstance(factor, bool) or not isinstance(factor, Real):
        raise TypeError(f"scaling[{i}]: expected a float, got {factor!r} ({type(factor).__name__})")
    value = float(factor)
    if not -math.inf < value < math.inf:  # comparisons: Dynamo can trace them, math.isfinite it cannot
        raise ValueError(f"scaling[{i}]: expected a finite float, got {factor}")
    return value


def _checked(ranks: tuple[object, ...], scaling: tuple[object, ...]) -> Mixture:
    if not ranks:
        raise ValueError("ranks: expected at least one expert, got an empty sequence")
    checked_ranks = tuple(_rank(i, rank) for i, rank in enumerate(ranks))
    if len(scaling) != len(ranks):
        raise ValueError(f"scaling: expected one float per expert ({len(ranks)}), got {len(scaling)}")
    return Mixture(checked_ranks, tuple(_factor(i, factor) for i, factor in enumerate(scaling)))


@lru_cache(maxsize=1024, typed=True)  # 2.0 equals 2, and only one of them is a rank
def _cached(experts: int, *ranks_and_scaling: object) -> Mixture:
    return _checked(ranks_and_scaling[:experts], ranks_and_scaling[experts:])


def make_mixture(ranks: Sequence[int], scaling: Sequence[float]) -> Mixture:
    """Checks ranks and scaling; the result is cached, so that a layer pays for the check once."""
    if type(ranks) is not tuple or type(scaling) is not tuple:
        for name, value in (("ranks", ranks), ("scaling", scaling)):
            if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
                raise TypeError(
                    f"{name}: expected a tuple with one number per expert, got {type(value).__name__}"
                )
        ranks, scaling = tuple(ranks), tuple(scaling)
    if torch.compiler.is_compiling():  # Dynamo traces through caches, with a warning
        return _checked(ranks, scaling)
    return _cached(len(ranks), *ranks, *scaling)
