"""How much two tasks use the same experts, and what that number would be if tasks, or experts, did not matter."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROUNDS = 200
"""Random relabellings, splits and shuffles behind each reference level."""
USED = 0.01
"""A task uses an expert whose usage is at least this."""
LISTED = 10


@dataclass(frozen=True)
class Usage:
    """One task's use of every expert, as ratios of sums over examples.

    Attributes:
        ids: record of each example.
        numerators, denominators: (examples, experts): a set of examples uses an expert by sum of the first / sum of the second.
    """

    ids: tuple[str, ...]
    numerators: Tensor
    denominators: Tensor

    def of(self, selection: Tensor | None = None) -> Tensor:
        """selection (..., examples) of 0 and 1, None for all, to (..., experts); 0 where nothing was seen."""
        if selection is None:
            selection = torch.ones(len(self.ids), dtype=torch.float64)
        seen = selection @ self.denominators
        return torch.where(seen > 0, selection @ self.numerators / seen.clamp(min=1e-300), 0)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Weighted Jaccard similarity over the last dimension, sum(min) / sum(max): 1 for the same use, 0 for nothing in common.

    NaN where neither uses anything.
    """
    return torch.minimum(a, b).sum(-1) / torch.maximum(a, b).sum(-1)


def share(a: Usage, b: Usage, layers: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """How far two tasks share experts.

    Args:
        a, b: use of the same experts.
        layers: (experts,) the layer of each expert, ascending.
        generator: of the reference levels.

    Returns:
        jaccard: of the two tasks.
        same: mean, and low, the 5 % quantile, if the task did not matter: labels of examples are exchanged, where both tasks
            ask about a record between those two. p: how often that is as low as what was found.
        unrelated: mean, and high, the 95 % quantile, if the second task used experts as much, but others: they are shuffled
            within each layer.
        both, first, second, neither: numbers of experts with a usage of at least `USED`.
        top_both, top_first, top_second: (expert, usage a, usage b) of the most shared, and of the largest differences.
    """
    ua, ub = a.of(), b.of()
    found = jaccard(ua, ub)
    pooled = Usage(
        a.ids + b.ids,
        torch.cat((a.numerators, b.numerators)),
        torch.cat((a.denominators, b.denominators)),
    )
    labels = _relabelled(a.ids, b.ids, generator)
    same = jaccard(pooled.of(labels), pooled.of(1 - labels))
    shuffled = ub[_shuffles(layers, generator)]
    unrelated = jaccard(ua, shuffled)
    in_a, in_b = ua >= USED, ub >= USED
    lower = (same <= found + 1e-12).sum().item()
    return {
        "jaccard": found.item(),
        "same": {"mean": same.mean().item(), "low": same.quantile(0.05).item()},
        "p": (1 + lower) / (1 + ROUNDS),
        "unrelated": {"mean": unrelated.mean().item(), "high": unrelated.quantile(0.95).item()},
        "both": int((in_a & in_b).sum()),
        "first": int((in_a & ~in_b).sum()),
        "second": int((in_b & ~in_a).sum()),
        "neither": int((~in_a & ~in_b).sum()),
        "top_both": _top(torch.minimum(ua, ub), ua, ub),
        "top_first": _top(ua - ub, ua, ub),
        "top_second": _top(ub - ua, ua, ub),
    }


def halves(task: Usage, generator: torch.Generator) -> float | None:
    """The mean similarity of two random halves of one task's examples: as alike as so few examples can be.

    None for a single example, or where nothing is open.
    """
    count = len(task.ids)
    if count < 2:
        return None
    order = torch.rand(ROUNDS, count, generator=generator).argsort(-1)
    first = (order < count // 2).double()
    found = jaccard(task.of(first), task.of(1 - first)).nanmean().item()
    return None if math.isnan(found) else found


def _relabelled(a: tuple[str, ...], b: tuple[str, ...], generator: torch.Generator) -> Tensor:
    """(ROUNDS, examples of a and b): 1 for those that play a's part."""
    places: dict[str, list[int]] = defaultdict(list)
    for place, record in enumerate(a + b):
        places[record].append(place)
    pairs = [p for p in places.values() if len(p) == 2 and p[0] < len(a) <= p[1]]
    labels = torch.zeros(ROUNDS, len(a) + len(b), dtype=torch.float64)
    labels[:, : len(a)] = 1
    if pairs:
        first, second = torch.tensor(pairs).T
        flips = torch.randint(2, (ROUNDS, len(pairs)), generator=generator).double()
        labels[:, first], labels[:, second] = flips, 1 - flips
    paired = {place for pair in pairs for place in pair}
    rest = torch.tensor([i for i in range(len(a) + len(b)) if i not in paired], dtype=torch.int64)
    order = torch.rand(ROUNDS, len(rest), generator=generator).argsort(-1)
    labels[:, rest] = labels[:, rest].gather(1, order)
    return labels


def _shuffles(layers: Tensor, generator: torch.Generator) -> Tensor:
    """(ROUNDS, experts): indices that move experts within their layer."""
    return (layers + torch.rand(ROUNDS, len(layers), generator=generator, dtype=torch.float64)).argsort(-1)


def _top(score: Tensor, a: Tensor, b: Tensor) -> list[tuple[int, float, float]]:
    order = score.argsort(descending=True, stable=True)[:LISTED].tolist()
    return [(i, a[i].item(), b[i].item()) for i in order if score[i] > 0]
