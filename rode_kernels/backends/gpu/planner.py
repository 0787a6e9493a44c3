"""The choice of kernels for a call, from its shapes alone: gate values act on the device, as early exits.

Variants are compared by what they move and by how many blocks move it (`rode_kernels.backends.gpu.cost`).
`python -m rode_kernels plan` explains a choice.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TypeVar

from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.plans import (
    MOST_O_TILE_COLUMNS,
    MOST_TOKENS,
    ROW_BYTES,
    BackwardPlan,
    Plan,
    ProblemShape,
    can_fuse,
    column_tiles,
    divide_up,
)
from rode_kernels.backends.gpu.shared_memory import SharedMemory


def typical_device(multiprocessors: int) -> cost.Device:
    """A device of so many multiprocessors, each with what one of an A100 has: what is chosen depends on proportions."""
    of = cost.DEVICES["A100"]
    fraction = multiprocessors / of.multiprocessors
    return replace(
        of,
        multiprocessors=multiprocessors,
        dram=of.dram * fraction,
        l2=of.l2 * fraction,
        tensor=of.tensor * fraction,
    )


_AnyPlan = TypeVar("_AnyPlan", Plan, BackwardPlan)


class NothingFits(RuntimeError):
    """No plan's launches fit the shared memory of a device."""


def _that_fit(plans: list[_AnyPlan], shape: ProblemShape, memory: SharedMemory | None) -> list[_AnyPlan]:
    """The plans whose launches fit a device's shared memory; all of them where `memory` is None."""
    if memory is None:
        return plans
    found = [plan for plan in plans if memory.fits(shape, plan)]
    if not found:
        least = min(memory.asked(shape, plan) for plan in plans)
        raise NothingFits(
            f"rode_kernels: the CUDA kernels need at least {least} bytes of shared memory in a block for "
            f"R = {shape.total_rank} and {shape.experts} experts, this device gives {memory.limit}; "
            "name backend='triton' or 'reference'"
        )
    return found


def variants_forward(
    shape: ProblemShape, multiprocessors: int, memory: SharedMemory | None = None
) -> list[Plan]:
    """The plans that `plan_forward` chooses from: one launch, if its blocks have room for the columns, and two launches with K in
    as many parts as fill the device, or fewer. None that asks for more than `memory` has."""
    depth, columns = ROW_BYTES // shape.element_size, column_tiles(shape.total_rank, shape.routed_experts)
    fits = can_fuse(shape.total_rank, shape.routed_experts)
    plans = [Plan(fused=True, rows=64, splits=1, out_tiles=1)] if fits else []
    rows = 16 if shape.tokens <= 16 and shape.total_rank <= depth else 64
    tiles = max(1, divide_up(shape.tokens, rows))  # without tokens no launch at all, but a plan
    blocks = tiles * divide_up(columns, 5 if columns <= 5 else 16)
    stages, most = divide_up(shape.in_features, depth), divide_up(multiprocessors, blocks)
    outs = divide_up(shape.out_features, depth)
    # one or two blocks for each multiprocessor, or a few less or more
    full = [n * multiprocessors for n in (1, 2)]
    parts = {max(1, min(outs, p)) for n in full for p in (n // tiles, divide_up(n, tiles))}
    tried = {1 << i for i in range(most.bit_length())} | {most}
    # to keep v is never slower than to make it again
    keep_v = shape.total_rank > depth and (memory is None or memory.fits(shape, Plan(False, 64, 1, 1, True)))
    # in whole stages, none without work
    for splits in sorted({divide_up(stages, divide_up(stages, min(s, stages))) for s in tried}):
        for out_tiles in sorted({divide_up(outs, p) for p in parts}):
            plans.append(Plan(fused=False, rows=rows, splits=splits, out_tiles=out_tiles, keep_v=keep_v))
    return _that_fit(plans, shape, memory)


@lru_cache(maxsize=4096)
def plan_forward(shape: ProblemShape, multiprocessors: int, memory: SharedMemory | None = None) -> Plan:
    """The variant of the forward pass with the lowest floor (`rode_kernels.backends.gpu.cost`) on so many multiprocessors.

    One launch reads x and base and writes y once if there are enough tiles of tokens for the device. With fewer, K is split, so
    that the whole device reads x and the weights.

    Args:
        memory: what a block may have and what the CUDA kernels ask for. None does not look at it: for other kernels than these.

    Raises:
        NothingFits: no variant does.
    """
    device = typical_device(multiprocessors)
    plans = variants_forward(shape, multiprocessors, memory)
    return min(plans, key=lambda plan: cost.forward(shape, plan).floor(device))


def prefer_gemm(shape: ProblemShape, backward: bool = False, triton: bool = False) -> bool:
    """Whether the gemm path (`rode_kernels.backends.gpu.gemm_path`) is faster than the CUDA, or Triton, kernels.

    Forward it is where a row of B has more than 128 bytes, so that v does not stay in registers. Then the matrix products take most
    of the time, not the memory traffic, and skipping closed experts does not make up for their rate. The same holds with many
    values to read: backward in float32 and above R = 32; with Triton's kernels also forward in float32, and backward always.
    It never runs a few tokens, for which it needs more launches and launching takes longest. Measured on one H100: docs/cuda.md.
    With dropout, which was not measured, the first rule alone counts, and only for CUDA: Triton has no kernel for the copy of x.
    """
    if shape.tokens <= 64 or (shape.dropout and triton):
        return False
    features, single = shape.tokens * (shape.in_features + shape.out_features), shape.element_size == 4
    if shape.total_rank * shape.element_size > ROW_BYTES:
        return True
    if shape.dropout:
        return False
    if not backward:
        return triton and single and features >= 2**22
    return features >= 2**23 and (single or shape.total_rank > 32 or (triton and features >= 2**25))


def variants_backward(
    shape: ProblemShape, multiprocessors: int, memory: SharedMemory | None = None
) -> list[BackwardPlan]:
    """The plans that `plan_backward` chooses from: O in as few tiles as blocks can hold, or more; ranges of tokens such that every
    multiprocessor has as many blocks as it holds, or fewer. None that asks for more than `memory` has."""
    groups = divide_up(shape.total_rank, 16) + divide_up(shape.routed_experts, 16)
    held = 3 if groups <= 3 else 5 if groups <= 5 else 4
    plans = _plans_backward(shape, multiprocessors, groups, held)
    if held == 5 and memory is not None and not any(memory.fits(shape, plan) for plan in plans):
        plans = _plans_backward(shape, multiprocessors, groups, 4)  # there is then more room for masks
    return _that_fit(plans, shape, memory)


def _plans_backward(shape: ProblemShape, multiprocessors: int, groups: int, held: int) -> list[BackwardPlan]:
    depth, tokens, R = ROW_BYTES // shape.element_size, max(shape.tokens, 1), shape.total_rank
    many_columns = R > 32
    k_tiles = divide_up(shape.in_features, 2 * depth)
    columns = k_tiles * (divide_up(groups, 4) if held == 4 else 1)
    fewest, plans = divide_up(shape.out_features, MOST_O_TILE_COLUMNS[many_columns, shape.element_size]), {}
    for wanted in (fewest, fewest + 1, fewest + 2, 2 * fewest, 3 * fewest, 4 * fewest):
        o_tile_columns = divide_up(divide_up(shape.out_features, wanted), depth) * depth
        o_tiles = divide_up(shape.out_features, o_tile_columns)
        blocks = o_tiles * divide_up(R, 64 if many_columns else 32)
        held_y = cost.resident_grad_output(many_columns, shape.element_size) * multiprocessors
        held_x = cost.resident_grad_input(held) * multiprocessors
        for splits_x in {max(1, held_x * part // 3 // columns) for part in (1, 2, 3)}:
            plans[o_tiles, splits_x] = BackwardPlan(
                many_columns=many_columns,
                o_tiles=o_tiles,
                o_tile_columns=o_tile_columns,
                tokens_per_split_y=_tokens_per_split(tokens, 16, held_y // blocks),
                groups=held,
                tokens_per_split_x=_tokens_per_split(tokens, 64, splits_x),
                tokens_per_split_dx=_tokens_per_split(tokens, 64, divide_up(2 * multiprocessors, k_tiles)),
            )
    return list(plans.values())


@lru_cache(maxsize=4096)
def plan_backward(
    shape: ProblemShape, multiprocessors: int, memory: SharedMemory | None = None
) -> BackwardPlan:
    """The variant of the backward pass with the lowest floor (`rode_kernels.backends.gpu.cost`); arguments as `plan_forward`'s."""
    device = typical_device(multiprocessors)
    plans = variants_backward(shape, multiprocessors, memory)
    return min(plans, key=lambda plan: cost.backward(shape, plan).floor(device))


def _tokens_per_split(tokens: int, tile: int, ranges: int) -> int:
    """Tokens of one of at most so many ranges, in whole tiles; of more ranges where a block could not hold its own."""
    per_split = divide_up(divide_up(tokens, tile), max(1, ranges)) * tile
    return min(per_split, MOST_TOKENS)
