"""Backward: what follows from dy (M, O) and, where gates were returned, from their gradient dgates (M, N).

    t_i = dy B_i       du_i = scaling_i g_i t_i      dg_i = scaling_i <t_i, u_i>      dh = (dg + dgates) [g > 0]
    dB_i = dy^T v_i    dA_i = du_i^T drop(x)         dWr = dh^T x, dbr = sum dh       dx = drop'(du A) + dh Wr

`through_y` reads dy once: parts of t, and dB of a range of tokens. `through_v` adds up t and gives dg, du, dh and dx. `weights`
reads x once: dA, dWr and dbr of a range of tokens. `add` sums the ranges in order. No atomics; blocks of tokens and their ranges
decide the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rode_kernels.triton.common import experts_of, gates_of, keep, load_tile, product, store_tile


@triton.jit
def through_y(
    dy, B, u, g, parts_of_t, ranges_of_dB, M, O, dy_row, dy_column, share, stride,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, NEED_T: tl.constexpr, NEED_B: tl.constexpr,
    DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of O, blocks of R, ranges of `share` tokens. parts_of_t (blocks of O, M, R) is written where it will be
    read; ranges_of_dB is (ranges, O, R) inside rows of `stride` values."""
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert, factor = experts_of(column, OFFSETS, SCALING, N)
    weight = load_tile(B, o, O, R, column, R, 1)  # (BLOCK_O, BLOCK_R)
    dB = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    if NEED_T:
        t_at = parts_of_t + tl.program_id(0).to(tl.int64) * M * R
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, M)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)
        gate = gates_of(g, row, last, expert, N, column < R)
        is_open = gate != 0.0  # (BLOCK_M, BLOCK_R)
        if DENSE or tl.max(is_open.to(tl.int32)) > 0:
            tile = load_tile(dy, row, last, dy_row, o, O, dy_column)  # (BLOCK_M, BLOCK_O)
            if NEED_T:
                t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                store_tile(t_at, row, last, R, column, R, product(tile, weight, t, PRECISION, INTERPRETED))
            if NEED_B:
                # loaded again: with one expert compiled Triton cannot move `is_open` to where v is wanted
                again = gates_of(g, row, last, expert, N, column < R)
                v = tl.where(
                    again != 0.0, factor[None, :] * again * load_tile(u, row, last, R, column, R, 1), 0.0
                )
                v = v.to(B.dtype.element_ty)
                dB = product(tl.trans(tile), v, dB, PRECISION, INTERPRETED)
    if NEED_B:
        store_tile(ranges_of_dB + tl.program_id(2).to(tl.int64) * stride, o, O, R, column, R, dB)


@triton.jit
def through_v(
    parts_of_t, u, g, dgates, A, W, dx, du, dh, seed, threshold, M, K, o_blocks, share,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, ROUTED: tl.constexpr, HAS_DY: tl.constexpr,
    HAS_DGATES: tl.constexpr, NEED_X: tl.constexpr, DENSE: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of tokens, parts of K of `share` columns. The first part writes du (M, R) in x's dtype, and dh (M, N): the
    gradient of the logits or, without a router, of the gates."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    writes = tl.program_id(1) == 0
    dg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    d = tl.zeros((BLOCK_M, BLOCK_R), du.dtype.element_ty)
    if HAS_DY:
        for c0 in tl.static_range(0, R, BLOCK_R):
            column = c0 + tl.arange(0, BLOCK_R)
            expert, factor = experts_of(column, OFFSETS, SCALING, N)
            t, d, is_open = _du(
                parts_of_t, g, row, column, expert, factor, M, o_blocks, N, R, DENSE, du.dtype.element_ty
            )
            if writes:
                store_tile(du, row, M, R, column, R, d)
            wanted = (is_open | DENSE) & (row < M)[:, None] & (column < R)[None, :]
            p = tl.where(wanted, factor[None, :] * t * load_tile(u, row, M, R, column, R, 1), 0.0)
            for i in range(N):  # by selection: what is not finite in one expert stays there
                of_expert = tl.sum(tl.where((expert == i)[None, :], p, 0.0), 1)
                dg = tl.where((n == i)[None, :], dg + of_expert[:, None], dg)
    else:
        if writes:
            for c0 in tl.static_range(0, R, BLOCK_R):
                column = c0 + tl.arange(0, BLOCK_R)
                store_tile(du, row, M, R, column, R, tl.zeros((BLOCK_M, BLOCK_R), tl.float32))
    if ROUTED:
        if HAS_DGATES:
            dg += load_tile(dgates, row, M, N, n, N, 1)
        dg = tl.where(load_tile(g, row, M, N, n, N, 1) != 0.0, dg, 0.0)  # (BLOCK_M, BLOCK_N)
    if writes:
        store_tile(dh, row, M, N, n, N, dg)
    if NEED_X:
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, K)
        narrow: tl.constexpr = R <= BLOCK_R  # then d holds all of du
        if DROPOUT:
            key = tl.load(seed)
        for k0 in range(first, last, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            if HAS_DY:
                if narrow:
                    c = tl.arange(0, BLOCK_R)
                    total = product(d, load_tile(A, c, R, K, k, K, 1), total, PRECISION, INTERPRETED)
                else:
                    for first_column in range(0, R, BLOCK_R):
                        c = first_column + tl.arange(0, BLOCK_R)
                        of, by = experts_of(c, OFFSETS, SCALING, N)
                        _, wide, _ = _du(
                            parts_of_t, g, row, c, of, by, M, o_blocks, N, R, DENSE, du.dtype.element_ty
                        )
                        total = product(wide, load_tile(A, c, R, K, k, K, 1), total, PRECISION, INTERPRETED)
            if DROPOUT:
                total = tl.where(keep(key, threshold, row, k0, K, BLOCK_K, ALIGNED), total, 0.0)
            if ROUTED:
                total = product(
                    dg.to(dx.dtype.element_ty), load_tile(W, n, N, K, k, K, 1), total, PRECISION, INTERPRETED
                )
            store_tile(dx, row, M, K, k, last, total)


@triton.jit
def _du(
    parts_of_t, g, row, column, expert, factor, M, o_blocks, N: tl.constexpr, R: tl.constexpr, DENSE: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """t, du in x's dtype and where gates are open. What t has where nothing was computed is not looked at."""
    gate = gates_of(g, row, M, expert, N, column < R)
    is_open = gate != 0.0
    inside = (is_open | DENSE) & (row < M)[:, None] & (column < R)[None, :]
    at = parts_of_t + row.to(tl.int64)[:, None] * R + column[None, :]
    t = tl.zeros((row.shape[0], column.shape[0]), tl.float32)
    for _ in range(o_blocks):
        t += tl.load(at, mask=inside, other=0.0)
        at += M * R
    return t, tl.where(is_open, factor[None, :] * gate * t, 0.0).to(dtype), is_open


@triton.jit
def weights(
    x, du, dh, ranges, seed, threshold, M, K, ld_x, share, stride, at_A, at_W, at_b,
    N: tl.constexpr, R: tl.constexpr, NEED_A: tl.constexpr, NEED_W: tl.constexpr, NEED_b: tl.constexpr, A_BLOCKS: tl.constexpr,
    DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of K, column blocks (A_BLOCKS of experts, then the router's), ranges of `share` tokens. A range's sums stand
    in its row of `stride` values: dA (R, K) from at_A on, dWr (N, K) from at_W on, dbr (N) from at_b on."""
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    block = tl.program_id(1)
    of_experts = block < A_BLOCKS
    columns = R if of_experts else N
    column = (block if of_experts else block - A_BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    bias = tl.zeros((BLOCK_R,), tl.float32)
    if DROPOUT:
        key = tl.load(seed)
    first = tl.program_id(2) * share
    last = tl.minimum(first + share, M)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)
        if of_experts:
            left = load_tile(du, row, last, R, column, R, 1)  # (BLOCK_M, BLOCK_R)
        else:
            wide = load_tile(dh, row, last, N, column, N, 1)
            bias += tl.sum(wide, 0)
            left = wide.to(x.dtype.element_ty)
        tile = load_tile(x, row, last, ld_x, k, K, 1)
        if DROPOUT:
            if of_experts:
                tile = tl.where(keep(key, threshold, row, k0, K, BLOCK_K, ALIGNED), tile, tl.zeros_like(tile))
        sums = product(tl.trans(left), tile, sums, PRECISION, INTERPRETED)
    to = ranges + tl.program_id(2).to(tl.int64) * stride
    if of_experts:
        if NEED_A:
            store_tile(to + at_A, column, columns, K, k, K, sums)
    else:
        if NEED_W:
            store_tile(to + at_W, column, columns, K, k, K, sums)
        if NEED_b and tl.program_id(0) == 0:
            tl.store(to + at_b + column, bias, mask=column < N)


@triton.jit
def add(ranges, dA, dB, dW, db, count, stride, at_A, at_W, at_b, BLOCK: tl.constexpr):
    """Sums of the ranges, in order, each gradient in its parameter's dtype. A row of `ranges` holds dB, dA, dWr, dbr, each from a
    multiple of BLOCK on, so that a program's values belong to one of them."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < stride
    total = tl.zeros((BLOCK,), tl.float32)
    at = ranges + i
    for _ in range(count):
        total += tl.load(at, mask=inside, other=0.0)
        at += stride
    first = tl.program_id(0) * BLOCK
    if first < at_A:
        tl.store(dB + i, total.to(dB.dtype.element_ty), mask=inside)
    elif first < at_W:
        tl.store(dA + (i - at_A), total.to(dA.dtype.element_ty), mask=inside)
    elif first < at_b:
        tl.store(dW + (i - at_W), total.to(dW.dtype.element_ty), mask=inside)
    else:
        tl.store(db + (i - at_b), total.to(db.dtype.element_ty), mask=inside)
