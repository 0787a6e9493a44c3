"""Sizes of blocks, from shapes; constants that kernels share; parameters as kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import triton
from torch import Tensor

from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.backends.triton import device
from rode_kernels.backends.triton.device import interpreted
from rode_kernels.mixture import Mixture
from rode_kernels.operands import MaybeTensor


@dataclass(frozen=True)
class Blocks:
    """Sizes that decide the bits: fixed for a shape class, never tuned.

    Attributes:
        k: of K in the sums of forward, of K and O in those of backward that run over features.
        r: of packed columns, all of them where R <= 64 (32 in float32). `expand` takes up to 256 at once.
        n: of experts.
        together: t and dB come from one reading of dy, for which one program must hold enough columns of y that t has few parts.
        o: columns of y whose dB one program computes, and their t. x: columns of x whose dA or dWr one program computes.
        tokens: of backward's sums over tokens. rows: tokens of a tile of t or dx.
    """

    k: int
    r: int
    n: int
    together: bool
    o: int
    x: int
    tokens: int
    rows: int


def blocks(tokens: int, total_rank: int, experts: int, element_size: int) -> Blocks:
    """Block sizes that fit the registers. float32 products without tf32 use no matrix unit and hold a whole K of operands."""
    fp32 = element_size == 4
    r = min(32 if fp32 else 64, max(16, triton.next_power_of_2(total_rank)))
    n = max(16, triton.next_power_of_2(experts))
    rows = 16 if tokens <= 16 or (fp32 and device.amd()) else 32 if fp32 else 64
    if fp32:
        return Blocks(k=16, r=r, n=n, together=False, o=64, x=64, tokens=16, rows=rows)
    if device.amd():  # fewer registers for each warp
        return Blocks(
            k=64, r=r, n=n, together=False, o=64, x=64, tokens=32, rows=min(rows, 32) if r == 64 else rows
        )
    o = min(256, 8192 // r)
    return Blocks(k=64, r=r, n=n, together=total_rank <= 32, o=o, x=256, tokens=32, rows=rows)


def columns_of_expand(total_rank: int, element_size: int) -> int:
    """Packed columns whose v `expand` holds at once: all of them up to R = 256, else 128; but 64 on AMD, and 32 in float32."""
    most = 32 if element_size == 4 else 64 if device.amd() else 256 if total_rank <= 256 else 128
    return int(min(most, max(16, triton.next_power_of_2(total_rank))))


def static(x: Tensor, mixture: Mixture) -> dict[str, Any]:
    """Constants of every kernel with products."""
    return dict(
        N=mixture.num_experts,
        R=mixture.total_rank,
        PRECISION=device.precision(x),
        INTERPRETED=interpreted(),
    )


def columns(mixture: Mixture, dropout_p: float) -> dict[str, Any]:
    """Expert index and scaling of each packed column."""
    return dict(OFFSETS=mixture.offsets, SCALING=mixture.scaling_with_dropout(dropout_p))


def dropout(x: Tensor, dropout_p: float) -> tuple[int, dict[str, bool]]:
    """The threshold that words are compared with, and constants."""
    return int(dropout_p * 2.0**32), dict(DROPOUT=dropout_p > 0.0, ALIGNED=x.shape[1] % 4 == 0)


def blocks_of_columns(firsts: tuple[int, ...], block: int) -> dict[str, Any]:
    """Constants that say which columns of all experts a block of so many has: see `common.block_of_columns`.

    Args:
        firsts: the first column of each mixture that has a mask of its own, and where the last one's end.
    """
    counts = (divide_up(end - first, block) for first, end in pairwise(firsts))
    return dict(MASKS=len(firsts) - 1, FIRSTS=firsts, BLOCKS=tuple(accumulate(counts, initial=0)))


def like(x: Tensor, weight: MaybeTensor) -> MaybeTensor:
    """A parameter in x's dtype, contiguous."""
    return weight if weight is None else weight.to(x.dtype).contiguous()


def split_evenly(size: int, block: int, parts: int) -> tuple[int, int]:
    """(parts, size of one) where `size` is split into at most so many, in whole blocks, none without work."""
    per_part = divide_up(divide_up(size, block), max(1, parts)) * block
    return divide_up(size, per_part), per_part
