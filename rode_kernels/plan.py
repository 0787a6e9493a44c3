"""Which kernels a call runs on, from its shapes alone: gate values act on the device, as early exits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

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
    """

    fused: bool
    rows: int
    splits: int
    out_tiles: int

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


def column_tiles(total_rank: int, routed_experts: int) -> int:
    """Tiles of 8 columns that one pass over x computes: the experts', then the router's (0 where gates are given)."""
    return _divide_up(total_rank, 8) + _divide_up(routed_experts, 8)


def can_fuse(total_rank: int, routed_experts: int) -> bool:
    """Whether u of 64 tokens has room in the registers of one block."""
    return (total_rank <= 32 and routed_experts <= 8) or (total_rank <= 64 and routed_experts <= 16)


@lru_cache(maxsize=4096)
def plan_forward(
    tokens: int,
    in_features: int,
    out_features: int,
    total_rank: int,
    routed_experts: int,
    element_size: int,
    multiprocessors: int,
) -> Plan:
    """The forward pass for M tokens on a device with so many multiprocessors.

    One launch where tiles of 64 tokens fill at least three quarters of the device: a block then reads x and base and writes y once.
    With fewer tokens K is shared out, so that the whole device reads x and the weights.
    """
    if can_fuse(total_rank, routed_experts) and 4 * _divide_up(tokens, 64) >= 3 * multiprocessors:
        return Plan(fused=True, rows=64, splits=1, out_tiles=1)
    tokens = max(tokens, 1)  # no launch at all, but a plan
    depth = ROW_BYTES // element_size
    rows = 16 if tokens <= 16 and total_rank <= depth else 64
    tiles = _divide_up(tokens, rows)
    columns = column_tiles(total_rank, routed_experts)
    blocks = tiles * _divide_up(columns, 5 if columns <= 5 else 16)
    stages = _divide_up(in_features, depth)
    # A block of the first launch reads x and weights of its part of K; one of the second, all parts of its tokens' sums. The latter
    # grow with the number of parts as the former shrink, and are least together where they are equal.
    of_a_tile = min(tokens, rows)
    first, second = (8 * columns + of_a_tile) * in_features * element_size, of_a_tile * 8 * columns * 4
    splits = max(1, min(stages, _divide_up(multiprocessors, blocks), round(math.sqrt(first / second))))
    splits = _divide_up(stages, _divide_up(stages, splits))  # none without work
    outs = _divide_up(out_features, depth)
    parts = min(outs, _divide_up(multiprocessors, tiles))
    return Plan(fused=False, rows=rows, splits=splits, out_tiles=_divide_up(outs, parts))


@dataclass(frozen=True)
class BackwardPlan:
    """How the CUDA backward pass runs (`csrc/cuda/backward.h` has the same fields).

    Attributes:
        wide: 64 packed columns share a reading of dy, not 32.
        slabs, slab: parts of O, and their columns; a part of t is the sum over one.
        share_y: tokens of a range whose dB a block of the first launch sums up.
        groups: of 16 columns of du and dh that a block of the third launch has: 3 or 5, all of them; or 4 in turn.
        share_x: tokens of a range whose dA and dWr it sums up.
    """

    wide: bool
    slabs: int
    slab: int
    share_y: int
    groups: int
    share_x: int


# What blocks of backward_y and backward_x hold (`SlabShape` and `ColumnShape`): columns of O by (wide, element size), and the most
# tokens of a range, of which a block notes in shared memory which ones are open.
_SLABS = {(False, 2): 768, (False, 4): 384, (True, 2): 384, (True, 4): 128}
MOST_TOKENS = 16 * 1536


@lru_cache(maxsize=4096)
def plan_backward(
    tokens: int,
    in_features: int,
    out_features: int,
    total_rank: int,
    routed_experts: int,
    element_size: int,
    multiprocessors: int,
) -> BackwardPlan:
    """The backward pass for M tokens: slabs and ranges of tokens such that there is about one block for each multiprocessor."""
    depth = ROW_BYTES // element_size
    tokens = max(tokens, 1)
    wide = total_rank > 32
    slabs = _divide_up(out_features, _SLABS[wide, element_size])
    slab = _divide_up(_divide_up(out_features, slabs), depth) * depth
    slabs = _divide_up(out_features, slab)
    blocks = slabs * _divide_up(total_rank, 64 if wide else 32)
    groups = _divide_up(total_rank, 16) + _divide_up(routed_experts, 16)
    held = 3 if groups <= 3 else 5 if groups <= 5 else 4
    columns = _divide_up(in_features, 2 * depth) * (1 if held != 4 else _divide_up(groups, 4) + 1)
    return BackwardPlan(
        wide=wide,
        slabs=slabs,
        slab=slab,
        share_y=_share(tokens, 16, multiprocessors // blocks),
        groups=held,
        share_x=_share(tokens, 64, multiprocessors // columns),
    )


def _share(tokens: int, tile: int, ranges: int) -> int:
    """Tokens of one of at most so many ranges, in whole tiles; of more ranges where a block could not hold its own."""
    share = _divide_up(_divide_up(tokens, tile), max(1, ranges)) * tile
    return min(share, MOST_TOKENS)
