"""Forward: y = base + sum_i scaling_i g_i B_i A_i drop(x), with g = relu(x Wr^T + br) or given.

M tokens, K in_features, O out_features, R packed columns, N experts. One launch (`fused`) where tiles of tokens fill the device,
else `shrink`, which leaves sums over parts of K in memory, and `expand`, which adds them in order: no atomics, the same bits on
every run. BLOCK_K and the number of parts decide the bits; BLOCK_M, BLOCK_O, warps and stages do not, and may be tuned.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rode_kernels.backends.triton.common import (
    block_of_columns,
    experts_of,
    gates_of,
    keep,
    load_tile,
    product,
    store_tile,
)

# Sizes that change from call to call: no variant of a kernel for those that 16 divides, nor for 1.
_SIZES = ["threshold", "M", "parts"]


@triton.jit
def expand_tiles(
    v, any_open, row, first, last, base, y, B, M, O, R, ld_base, ld_y, HAS_BASE: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """y[:, first:last] = base + v B^T for v (BLOCK_M, BLOCK_R); what is closed copies base, or is left alone in place."""
    column = tl.arange(0, BLOCK_R)
    if any_open:
        for o0 in range(first, last, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O)
            weight = load_tile(B, o, last, R, column, R, 1)  # (BLOCK_O, BLOCK_R)
            total = tl.zeros((row.shape[0], BLOCK_O), tl.float32)
            total = product(v, tl.trans(weight), total, PRECISION, INTERPRETED)
            if HAS_BASE:
                total += load_tile(base, row, M, ld_base, o, last, 1).to(tl.float32)
            store_tile(y, row, M, ld_y, o, last, total)
    elif not INPLACE:
        for o0 in range(first, last, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O)
            total = tl.zeros((row.shape[0], BLOCK_O), tl.float32)
            if HAS_BASE:
                total += load_tile(base, row, M, ld_base, o, last, 1).to(tl.float32)
            store_tile(y, row, M, ld_y, o, last, total)


@triton.jit(do_not_specialize=_SIZES)
def fused(
    x, A, W, B, bias, g, base, y, u, seed, threshold, M, K, O, ld_x, ld_base, ld_y,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, ROUTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_BASE: tl.constexpr, INPLACE: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program takes BLOCK_M tokens through everything; R <= BLOCK_R and N <= BLOCK_N, so that v stays with it."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if DROPOUT:
        key = tl.load(seed)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        tile = load_tile(x, row, M, ld_x, k, K, 1)  # (BLOCK_M, BLOCK_K)
        if ROUTED:
            h = product(tile, tl.trans(load_tile(W, n, N, K, k, K, 1)), h, PRECISION, INTERPRETED)
        if DROPOUT:
            tile = tl.where(keep(key, threshold, row, k0, K, BLOCK_K, ALIGNED), tile, tl.zeros_like(tile))
        sums = product(tile, tl.trans(load_tile(A, column, R, K, k, K, 1)), sums, PRECISION, INTERPRETED)
    expert, factor = experts_of(column, OFFSETS, SCALING, N)
    if ROUTED:
        if HAS_BIAS:
            h += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
        h = tl.where(h <= 0.0, 0.0, h)  # (BLOCK_M, BLOCK_N); NaN is not swallowed
        store_tile(g, row, M, N, n, N, h)
        gate = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i in tl.static_range(
            N
        ):  # each expert's gate to its columns, by selection: others' NaN stays theirs
            of_expert = tl.sum(tl.where((n == i)[None, :], h, 0.0), 1)
            gate = tl.where((expert == i)[None, :], of_expert[:, None], gate)
        gate = tl.where((row < M)[:, None] & (column < R)[None, :], gate, 0.0)
    else:
        gate = gates_of(g, row, M, expert, N, column < R)
    is_open = gate != 0.0
    v = tl.where(is_open, factor[None, :] * gate * sums, 0.0).to(x.dtype.element_ty)  # (BLOCK_M, BLOCK_R)
    store_tile(u, row, M, R, column, R, sums if DENSE else tl.where(is_open, sums, 0.0))
    any_open = tl.max(is_open.to(tl.int32)) > 0
    expand_tiles(
        v, any_open, row, 0, O, base, y, B, M, O, R, ld_base, ld_y, HAS_BASE, INPLACE, BLOCK_R, BLOCK_O, PRECISION, INTERPRETED
    )  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def shrink(
    x, A, W, partial, seed, threshold, M, K, ld_x, per_split, N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, A_BLOCKS: tl.constexpr, MASKS: tl.constexpr, FIRSTS: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """partial (parts, M, WIDTH): sums over `per_split` values of K, for the experts' columns and then, if routed, for the logits.
    Programs: column blocks (A_BLOCKS of experts, see `block_of_columns`, then the router's), tiles of tokens, parts of K."""
    row = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    part, block = tl.program_id(2), tl.program_id(0)
    of_experts = block < A_BLOCKS
    weight = A if of_experts else W
    of_one, end, mixture = block_of_columns(block, MASKS, FIRSTS, BLOCKS, BLOCK_R)
    columns = end if of_experts else N
    column = (of_one if of_experts else (block - A_BLOCKS) * BLOCK_R) + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    if DROPOUT:
        key = tl.load(seed + mixture)
    first = part * per_split
    last = tl.minimum(first + per_split, K)
    for k0 in range(first, last, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        tile = load_tile(x, row, M, ld_x, k, K, 1)
        if DROPOUT:
            if of_experts:
                tile = tl.where(keep(key, threshold, row, k0, K, BLOCK_K, ALIGNED), tile, tl.zeros_like(tile))
        sums = product(
            tile, tl.trans(load_tile(weight, column, columns, K, k, K, 1)), sums, PRECISION, INTERPRETED
        )
    to = partial + part.to(tl.int64) * M * WIDTH + (0 if of_experts else R)
    store_tile(to, row, M, WIDTH, column, columns, sums)


@triton.jit(do_not_specialize=_SIZES)
def expand(
    partial, B, bias, g, base, y, u, M, O, parts, columns_per_split, ld_base, ld_y,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr, ROUTER: tl.constexpr,
    ROUTED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_BASE: tl.constexpr, INPLACE: tl.constexpr, DENSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the parts, whose logits begin at column ROUTER, then makes gates, u (by the programs of the first part of O), v and y.
    Programs: tiles of tokens, parts of O of `columns_per_split` columns. v is made again for each tile of y if R > BLOCK_R."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    writes = tl.program_id(1) == 0
    first = tl.program_id(1) * columns_per_split
    last = tl.minimum(first + columns_per_split, O)
    if ROUTED:
        if writes:
            for n0 in tl.static_range(0, N, 16):
                n = n0 + tl.arange(0, 16)
                h = _added(partial, row, n, n < N, M, parts, ROUTER, WIDTH)
                if HAS_BIAS:
                    h += tl.load(bias + n, mask=n < N, other=0.0)[None, :]
                store_tile(g, row, M, N, n, N, tl.where(h <= 0.0, 0.0, h))
    if R <= BLOCK_R:
        column = tl.arange(0, BLOCK_R)
        v, any_open = _v(
            partial, bias, g, u, row, column, M, parts, writes, OFFSETS, SCALING, N, R, WIDTH, ROUTER, ROUTED, HAS_BIAS, DENSE,
            B.dtype.element_ty,
        )  # fmt: skip
        expand_tiles(
            v, any_open > 0, row, first, last, base, y, B, M, O, R, ld_base, ld_y, HAS_BASE, INPLACE, BLOCK_R, BLOCK_O, PRECISION,
            INTERPRETED,
        )  # fmt: skip
    else:
        for o0 in range(first, last, BLOCK_O):
            o = o0 + tl.arange(0, BLOCK_O)
            total = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
            any_open = 0
            for c0 in range(0, R, BLOCK_R):
                column = c0 + tl.arange(0, BLOCK_R)
                v, is_open = _v(
                    partial, bias, g, u, row, column, M, parts, writes and o0 == first, OFFSETS, SCALING, N, R, WIDTH, ROUTER,
                    ROUTED, HAS_BIAS, DENSE, B.dtype.element_ty,
                )  # fmt: skip
                if is_open > 0:
                    any_open = 1
                    total = product(
                        v, tl.trans(load_tile(B, o, last, R, column, R, 1)), total, PRECISION, INTERPRETED
                    )
            if any_open > 0 or not INPLACE:
                if HAS_BASE:
                    total += load_tile(base, row, M, ld_base, o, last, 1).to(tl.float32)
                store_tile(y, row, M, ld_y, o, last, total)


@triton.jit
def _added(partial, row, column, inside_column, M, parts, first, WIDTH: tl.constexpr):
    """Sums over the parts of K of columns first + column, in order."""
    inside = (row < M)[:, None] & inside_column[None, :]
    at = partial + row.to(tl.int64)[:, None] * WIDTH + (first + column)[None, :]
    total = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for _ in range(parts):
        total += tl.load(at, mask=inside, other=0.0)
        at += M * WIDTH
    return total


@triton.jit
def _v(
    partial, bias, g, u, row, column, M, parts, writes, OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr,
    R: tl.constexpr, WIDTH: tl.constexpr, ROUTER: tl.constexpr, ROUTED: tl.constexpr, HAS_BIAS: tl.constexpr, DENSE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """v in x's dtype of (BLOCK_M, BLOCK_R) columns, and 1 if a gate is open, else 0. Writes u if it is this program's to write."""
    expert, factor = experts_of(column, OFFSETS, SCALING, N)
    if ROUTED:
        # each column adds up its own expert's logit: what another program writes to g is not waited for
        h = _added(partial, row, expert, column < R, M, parts, ROUTER, WIDTH)
        if HAS_BIAS:
            h += tl.load(bias + expert)[None, :]
        gate = tl.where((row < M)[:, None] & (column < R)[None, :] & ~(h <= 0.0), h, 0.0)
    else:
        gate = gates_of(g, row, M, expert, N, column < R)
    sums = _added(partial, row, column, column < R, M, parts, 0, WIDTH)
    is_open = gate != 0.0
    v = tl.where(is_open, factor[None, :] * gate * sums, 0.0).to(dtype)
    if writes:
        store_tile(u, row, M, R, column, R, sums if DENSE else tl.where(is_open, sums, 0.0))
    return v, tl.max(is_open.to(tl.int32))
