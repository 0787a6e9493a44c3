"""Which kernels a call runs on, from its shapes alone: gate values act on the device, as early exits.

Variants are compared by what they move and by how many blocks move it (`rode_kernels.backends.gpu.cost`).
`python -m rode_kernels plan` explains a choice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.cost import Call

if TYPE_CHECKING:
    from rode_kernels.backends.gpu.shared_memory import SharedMemory

# What the CUDA kernels are written for; the arrays in `ForwardParams` (csrc/cuda/forward.cuh) have these sizes.
MAX_EXPERTS, MAX_RANK, MAX_FEATURES, MAX_TOKENS = 64, 1024, 32768, 2**20
ROW_BYTES = 128  # of a tile in shared memory, whatever the dtype


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Plan:
    """How the CUDA forward pass runs (`csrc/cuda/forward.h` has the same fields).

    Attributes:
        fused: one launch: a block takes 64 tokens through both products, v never leaves it. Otherwise two launches, with sums over
            parts of K in memory between them.
        rows: tokens of a tile, 64; or 16, for decoding, where the warps of a block share K instead of tokens.
        splits: parts of K that blocks of the first launch share; the second launch adds them in order.
        out_tiles: how many times 128 bytes of a row of y a block of the second launch produces.
        keep_v: v stays in shared memory between them. Otherwise it is made again for each, if a row of B has more than 128 bytes.
    """

    fused: bool
    rows: int
    splits: int
    out_tiles: int
    keep_v: bool = False

    def check(self, total_rank: int, routed_experts: int, element_size: int) -> None:
        """Raises ValueError for a plan that the kernels have no variant for."""
        if self.fused and not can_fuse(total_rank, routed_experts):
            raise ValueError(
                f"{self}: {total_rank} columns and {routed_experts} routed experts do not fit one launch"
            )
        if self.fused and self.rows != 64:
            raise ValueError(f"{self}: one launch takes tiles of 64 tokens")
        if self.rows not in (16, 64) or (self.rows == 16 and total_rank * element_size > ROW_BYTES):
            raise ValueError(
                f"{self}: tiles have 64 tokens, or 16 if a row of B has at most {ROW_BYTES} bytes"
            )
        if self.splits < 1 or self.out_tiles < 1:
            raise ValueError(f"{self}: expected splits and out_tiles of at least 1")
        if self.keep_v and (self.fused or total_rank * element_size <= ROW_BYTES):
            raise ValueError(
                f"{self}: v is kept with two launches, if a row of B has more than {ROW_BYTES} bytes"
            )


def column_tiles(total_rank: int, routed_experts: int) -> int:
    """Tiles of 8 columns that one pass over x computes: the experts', then the router's (0 where gates are given)."""
    return _divide_up(total_rank, 8) + _divide_up(routed_experts, 8)


def can_fuse(total_rank: int, routed_experts: int) -> bool:
    """Whether u of 64 tokens has room in the registers of one block."""
    return (total_rank <= 32 and routed_experts <= 8) or (total_rank <= 64 and routed_experts <= 16)


def typical_device(multiprocessors: int) -> cost.Device:
    """A device of so many multiprocessors, each with what one of an A100 has: what is chosen depends on proportions."""
    of = cost.DEVICES["A100"]
    share = multiprocessors / of.multiprocessors
    return replace(
        of, multiprocessors=multiprocessors, dram=of.dram * share, l2=of.l2 * share, tensor=of.tensor * share
    )


_AnyPlan = TypeVar("_AnyPlan", "Plan", "BackwardPlan")


def _that_fit(plans: list[_AnyPlan], call: Call, memory: SharedMemory | None) -> list[_AnyPlan]:
    """Those whose launches a device has shared memory for; all of them where `memory` is None."""
    found = plans if memory is None else [plan for plan in plans if memory.fits(call, plan)]
    if not found:
        least = min(memory.asked(call, plan) for plan in plans)
        raise RuntimeError(
            f"rode_kernels: the CUDA kernels need at least {least} bytes of shared memory in a block for "
            f"R = {call.total_rank} and {call.experts} experts, this device gives {memory.limit}; "
            "name backend='triton' or 'reference'"
        )
    return found


def variants_forward(call: Call, multiprocessors: int, memory: SharedMemory | None = None) -> list[Plan]:
    """The plans that `plan_forward` chooses from: one launch, if its blocks have room for the columns, and two launches with K in
    as many parts as fill the device, or fewer. None that asks for more than `memory` has."""
    depth, columns = ROW_BYTES // call.element_size, column_tiles(call.total_rank, call.routed_experts)
    fits = can_fuse(call.total_rank, call.routed_experts)
    plans = [Plan(fused=True, rows=64, splits=1, out_tiles=1)] if fits else []
    rows = 16 if call.tokens <= 16 and call.total_rank <= depth else 64
    tiles = max(1, _divide_up(call.tokens, rows))  # without tokens no launch at all, but a plan
    blocks = tiles * _divide_up(columns, 5 if columns <= 5 else 16)
    stages, most = _divide_up(call.in_features, depth), _divide_up(multiprocessors, blocks)
    outs = _divide_up(call.out_features, depth)
    # one or two blocks for each multiprocessor, or a few less or more
    full = [n * multiprocessors for n in (1, 2)]
    parts = {max(1, min(outs, p)) for n in full for p in (n // tiles, _divide_up(n, tiles))}
    tried = {1 << i for i in range(most.bit_length())} | {most}
    # to keep v is never slower than to make it again
    keep_v = call.total_rank > depth and (memory is None or memory.fits(call, Plan(False, 64, 1, 1, True)))
    # in whole stages, none without work
    for splits in sorted({_divide_up(stages, _divide_up(stages, min(s, stages))) for s in tried}):
        for share in sorted({_divide_up(outs, p) for p in parts}):
            plans.append(Plan(fused=False, rows=rows, splits=splits, out_tiles=share, keep_v=keep_v))
    return _that_fit(plans, call, memory)


@lru_cache(maxsize=4096)
def plan_forward(call: Call, multiprocessors: int, memory: SharedMemory | None = None) -> Plan:
    """The variant of the forward pass with the lowest floor (`rode_kernels.backends.gpu.cost`) on so many multiprocessors.

    One launch reads x and base and writes y once if there are enough tiles of tokens for the device. With fewer, K is split, so
    that the whole device reads x and the weights.

    Args:
        memory: what a block may have and what the CUDA kernels ask for. None does not look at it: for other kernels than these.

    Raises:
        RuntimeError: no variant fits.
    """
    device = typical_device(multiprocessors)
    plans = variants_forward(call, multiprocessors, memory)
    return min(plans, key=lambda plan: cost.forward(call, plan).floor(device))


def by_library(call: Call, backward: bool = False, triton: bool = False) -> bool:
    """Whether products of PyTorch's library (`rode_kernels.backends.gpu.gemm_path`) are faster than the CUDA, or Triton, kernels.

    Forward they are where a row of B has more than 128 bytes, so that v does not stay in registers: then products decide, and not
    what moves, and skipping what is closed does not make up for their rate. So they do with much to read: backward in float32 and
    above R = 32; with Triton's kernels forward in float32, too, and backward always. Not for a few tokens, where a call takes the
    host longest, and a library needs more launches; nor with dropout, for which it would need a copy of x. Measured on one H100:
    docs/cuda.md.
    """
    if call.tokens <= 64 or call.dropout:
        return False
    features, single = call.tokens * (call.in_features + call.out_features), call.element_size == 4
    if call.total_rank * call.element_size > ROW_BYTES:
        return True
    if not backward:
        return triton and single and features >= 2**22
    return features >= 2**23 and (single or call.total_rank > 32 or (triton and features >= 2**25))


@dataclass(frozen=True)
class BackwardPlan:
    """How the CUDA backward pass runs (`csrc/cuda/backward.h` has the same fields).

    Attributes:
        wide: 64 packed columns share a reading of dy, not 32.
        slabs, slab: parts of O, and their columns; a part of t is the sum over one.
        share_y: tokens of a range whose dB a block of the first launch sums up.
        groups: of 16 columns of du and dh that a block of the third launch has: 3 or 5, all of them; or 4 in turn.
        share_x: tokens of a range whose dA and dWr it sums up.
        share_dx: with 4 groups blocks of their own write dx, each of so many tokens.
    """

    wide: bool
    slabs: int
    slab: int
    share_y: int
    groups: int
    share_x: int
    share_dx: int

    def check(self, element_size: int) -> None:
        """Raises ValueError for a plan that the kernels have no variant for."""
        most = _SLABS[self.wide, element_size]
        if not 0 < self.slab <= most:
            raise ValueError(f"{self}: a block holds at most {most} columns of y")


# What blocks of backward_y and backward_x hold (`SlabShape` and `ColumnShape`): columns of O by (wide, element size), and the most
# tokens of a range, of which a block notes in shared memory which ones are open.
_SLABS = {(False, 2): 384, (False, 4): 384, (True, 2): 384, (True, 4): 128}
MOST_TOKENS = 16 * 1536


def variants_backward(
    call: Call, multiprocessors: int, memory: SharedMemory | None = None
) -> list[BackwardPlan]:
    """The plans that `plan_backward` chooses from: O in as few slabs as blocks can hold, or more; ranges of tokens such that every
    multiprocessor has as many blocks as it holds, or fewer. None that asks for more than `memory` has."""
    depth, tokens, R = ROW_BYTES // call.element_size, max(call.tokens, 1), call.total_rank
    wide = R > 32
    groups = _divide_up(R, 16) + _divide_up(call.routed_experts, 16)
    held = 3 if groups <= 3 else 5 if groups <= 5 else 4
    k_slabs = _divide_up(call.in_features, 2 * depth)
    columns = k_slabs * (_divide_up(groups, 4) if held == 4 else 1)
    fewest, plans = _divide_up(call.out_features, _SLABS[wide, call.element_size]), {}
    for wanted in (fewest, fewest + 1, fewest + 2, 2 * fewest, 3 * fewest, 4 * fewest):
        slab = _divide_up(_divide_up(call.out_features, wanted), depth) * depth
        slabs = _divide_up(call.out_features, slab)
        blocks = slabs * _divide_up(R, 64 if wide else 32)
        of_x = cost.resident_x(held) * multiprocessors
        for ranges_x in {max(1, of_x * part // 3 // columns) for part in (1, 2, 3)}:
            plans[slabs, ranges_x] = BackwardPlan(
                wide=wide,
                slabs=slabs,
                slab=slab,
                share_y=_share(
                    tokens, 16, cost.resident_y(wide, call.element_size) * multiprocessors // blocks
                ),
                groups=held,
                share_x=_share(tokens, 64, ranges_x),
                share_dx=_share(tokens, 64, _divide_up(2 * multiprocessors, k_slabs)),
            )
    return _that_fit(list(plans.values()), call, memory)


@lru_cache(maxsize=4096)
def plan_backward(call: Call, multiprocessors: int, memory: SharedMemory | None = None) -> BackwardPlan:
    """The variant of the backward pass with the lowest floor (`rode_kernels.backends.gpu.cost`); arguments as `plan_forward`'s."""
    device = typical_device(multiprocessors)
    plans = variants_backward(call, multiprocessors, memory)
    return min(plans, key=lambda plan: cost.backward(call, plan).floor(device))


def _share(tokens: int, tile: int, ranges: int) -> int:
    """Tokens of one of at most so many ranges, in whole tiles; of more ranges where a block could not hold its own."""
    share = _divide_up(_divide_up(tokens, tile), max(1, ranges)) * tile
    return min(share, MOST_TOKENS)
