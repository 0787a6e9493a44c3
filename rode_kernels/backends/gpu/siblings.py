"""Mixtures that read the same x, side by side as one: where their columns stand, whether they run together, and by which plans.

The columns of all experts come first, then those of all routers; each mixture's begin at a multiple that the kernels ask for, with
zeros between. x is then read once, forward and backward, as for one mixture of so many columns. What has to do with y stays apart.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple, Self

import torch
from torch import Tensor

from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.cost import Cost, Step
from rode_kernels.backends.gpu.planner import (
    NothingFits,
    plan_backward,
    plan_forward,
    typical_device,
    variants_forward,
)
from rode_kernels.backends.gpu.plans import (
    MAX_EXPERTS,
    MAX_RANK,
    BackwardPlan,
    Plan,
    ProblemShape,
    divide_up,
)
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.mixture import Mixture
from rode_kernels.operands import AnyOperands, Settings


class Columns(NamedTuple):
    """Columns of several mixtures side by side.

    Attributes:
        experts, routers: the first column of each mixture's experts and of its router.
        total_rank, total_experts: columns of all experts and of all routers, zeros included.
    """

    experts: tuple[int, ...]
    routers: tuple[int, ...]
    total_rank: int
    total_experts: int

    @classmethod
    def of(cls, mixtures: Sequence[Mixture], multiple: int) -> Self:
        def firsts(counts: list[int], start: int) -> tuple[int, ...]:
            return tuple(accumulate((divide_up(n, multiple) * multiple for n in counts), initial=start))

        *experts, R = firsts([m.total_rank for m in mixtures], 0)
        *routers, end = firsts([m.num_experts for m in mixtures], R)
        return cls(tuple(experts), tuple(routers), R, end - R)

    @property
    def total(self) -> int:
        return self.total_rank + self.total_experts

    def settings(self, dropout_p: float) -> Settings:
        """The settings of one mixture with so many columns. Its first experts have the columns of one mixture each, by which
        kernels find the mask of a column; the others have none."""
        N = self.total_experts
        ranks = [end - first for first, end in pairwise((*self.experts, self.total_rank))]
        return Settings(Mixture((*ranks, *(0,) * (N - len(ranks))), (1.0,) * N), dropout_p, False)

    def shape(self, shapes: Sequence[ProblemShape], masks: int = 1) -> ProblemShape:
        """The shape of that mixture, as wide as the widest, with so many masks of dropout."""
        widest = max(shape.out_features for shape in shapes)
        R, N = self.total_rank, self.total_experts
        return replace(shapes[0], out_features=widest, total_rank=R, experts=N, masks=masks)


@lru_cache
def say_one_by_one(why: str) -> None:
    """Warns, once for each reason, that siblings run one by one."""
    warnings.warn(
        f"rode_kernels: {why} run one by one, which reads x once for each of them and is slower", stacklevel=2
    )


def apart(operands: Sequence[AnyOperands], settings: Sequence[Settings], by_gemm: bool) -> str:
    """Why siblings cannot run together, by the kernels or on the GEMM path; empty where they can."""
    if any(s.dropout_p != settings[0].dropout_p for s in settings):
        return "siblings with different probabilities of dropout"
    if any(s.dense for s in settings) or any(o.router_weight is None for o in operands):
        return "siblings without a router"
    columns = Columns.of([s.mixture for s in settings], 16)
    if not by_gemm and (columns.total_rank > MAX_RANK or columns.total_experts > MAX_EXPERTS):
        return (
            f"siblings with more than {MAX_RANK} columns or {MAX_EXPERTS} experts together "
            "(each mixture's in multiples of 16)"
        )
    return ""


def count_masks(operands: Sequence[AnyOperands], settings: Sequence[Settings]) -> int:
    """Masks of dropout that a joint pass makes: one for each sibling, or one if all have the same seed tensor, or no dropout."""
    if settings[0].dropout_p == 0 or len({o.seed.data_ptr() for o in operands if o.seed is not None}) < 2:
        return 1
    return len(operands)


def seeds_of(operands: Sequence[AnyOperands], masks: int) -> Tensor | None:
    """The seeds of so many masks side by side; None without dropout."""
    seeds = [o.seed for o in operands if o.seed is not None]
    return torch.cat(seeds) if masks > 1 else seeds[0] if seeds else None


class ForwardPlans(NamedTuple):
    """The plan of each mixture's second launch. All have the same `splits`, those of the first launch, which they share."""

    each: tuple[Plan, ...]


class BackwardPlans(NamedTuple):
    """The plan of the launch over x, and of each mixture's other launches, with that one's ranges of tokens."""

    shared: BackwardPlan
    each: tuple[BackwardPlan, ...]


def _packing(shape: ProblemShape, packs_anyway: bool) -> tuple[Step, ...]:
    """Laying the parameters side by side, which single calls need not do unless they are in another dtype."""
    if packs_anyway:
        return ()
    moved = 2 * (shape.total_rank + shape.routed_experts) * shape.in_features * shape.element_size
    return (Step(moved, moved, divide_up(moved, 2 * 16 * 128)),)


def forward_cost(
    shapes: Sequence[ProblemShape], joint: ProblemShape, plans: ForwardPlans, packs: bool
) -> Cost:
    """Cost of the forward pass of siblings; `joint` is the shape of all of them as one."""
    first = cost.forward(joint, plans.each[0]).steps[0]
    rest = (cost.forward(shape, plan).steps[1] for shape, plan in zip(shapes, plans.each, strict=True))
    return Cost((*_packing(joint, not packs), first, *rest))


def backward_cost(
    shapes: Sequence[ProblemShape], joint: ProblemShape, plans: BackwardPlans, packs: bool
) -> Cost:
    """Cost of the backward pass of siblings, with every gradient wanted."""
    found = [cost.backward(shape, plan).steps for shape, plan in zip(shapes, plans.each, strict=True)]
    before = [step for steps in found for step in steps[:2]]
    shared = cost.backward(joint, plans.shared).steps[2]
    return Cost((*_packing(joint, not packs), *before, shared, *(steps[3] for steps in found)))


@lru_cache(maxsize=4096)
def plan_siblings_forward(
    shapes: tuple[ProblemShape, ...],
    joint: ProblemShape,
    multiprocessors: int,
    memory: SharedMemory | None,
    packs: bool,
    always: bool = False,
) -> ForwardPlans | None:
    """The plans with the lowest floor; None where calls one by one have a lower one, unless it has to be (`always`).

    Args:
        packs: whether parameters are packed only for this.
    """
    device = typical_device(multiprocessors)

    def second_launch(shape: ProblemShape, splits: int) -> Plan:
        found = (
            replace(plan, rows=64, splits=splits)
            for plan in variants_forward(shape, multiprocessors, memory)
            if not plan.fused
        )
        return min(found, key=lambda plan: cost.forward(shape, plan).steps[1].floor(device))

    tried = {plan.splits for plan in variants_forward(joint, multiprocessors) if not plan.fused}
    candidates = [
        ForwardPlans(tuple(second_launch(shape, splits) for shape in shapes)) for splits in sorted(tried)
    ]

    def floor(plans: ForwardPlans) -> float:
        return forward_cost(shapes, joint, plans, packs).floor(device)

    best = min(candidates, key=floor)
    alone = (
        cost.forward(shape, plan_forward(shape, multiprocessors, memory)).floor(device) for shape in shapes
    )
    return best if always or floor(best) < sum(alone) else None


@lru_cache(maxsize=4096)
def plan_siblings_backward(
    shapes: tuple[ProblemShape, ...],
    joint: ProblemShape,
    multiprocessors: int,
    memory: SharedMemory | None,
    packs: bool,
    always: bool = False,
) -> BackwardPlans | None:
    """As `plan_siblings_forward`; None also where the masks of `joint` do not fit a device's shared memory."""
    device = typical_device(multiprocessors)
    try:
        shared = plan_backward(joint, multiprocessors, memory)
    except NothingFits:
        say_one_by_one("siblings whose masks of dropout do not fit the shared memory of the device")
        return None
    alone = [plan_backward(shape, multiprocessors, memory) for shape in shapes]
    each = tuple(
        replace(
            plan,
            groups=shared.groups,
            tokens_per_split_x=shared.tokens_per_split_x,
            tokens_per_split_dx=shared.tokens_per_split_dx,
        )
        for plan in alone
    )
    plans = BackwardPlans(shared, each)
    floor = backward_cost(shapes, joint, plans, packs).floor(device)
    floors = (cost.backward(shape, plan).floor(device) for shape, plan in zip(shapes, alone, strict=True))
    return plans if always or floor < sum(floors) else None
