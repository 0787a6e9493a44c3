"""Backward: what follows from dy (M, O) and, where gates were returned, from their gradient dgates (M, N).

    t_i = dy B_i       du_i = scaling_i g_i t_i      dg_i = scaling_i <t_i, u_i>      dh = (dg + dgates) [g > 0]
    dB_i = dy^T v_i    dA_i = du_i^T drop(x)         dWr = dh^T x, dbr = sum dh       dx = drop'(du A) + dh Wr

`grad_output_pass` reads dy: parts of t, and dB of a range of tokens. `gate_backward` adds up t and computes dg, du and dh.
`grad_input_pass` has programs that read x, for dA, dWr and dbr of a range of tokens, and programs that write dx.
`reduce_partials` sums the ranges in order. There are no atomics; blocks of tokens and their ranges decide the bits.
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
_SIZES = ["threshold", "M", "parts", "count_y", "count_x", "count_b"]


@triton.jit(do_not_specialize=_SIZES)
def grad_output_pass(
    dy, B, u, g, t_partial, dB_partial, M, O, dy_row, dy_column, parts, part, tokens_per_split, stride,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, TOGETHER: tl.constexpr, NEED_T: tl.constexpr,
    NEED_B: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """t_partial (parts, M, R) is written where it will be read; dB_partial is (ranges, O, R) inside rows of `stride` values.

    TOGETHER (R <= BLOCK_R): a program takes GROUP blocks of BLOCK_O columns of y and `tokens_per_split` tokens. It computes both
    from one reading of dy, so that a part of t is the sum over its columns. Else there are two kinds of programs: the first
    compute t, the others dB.
    """
    blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    column = tl.program_id(0) % blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    expert, factor = experts_of(column, OFFSETS, SCALING, N)
    at = tl.program_id(0) // blocks
    if NEED_T and not TOGETHER:
        of_t = (M + ROWS - 1) // ROWS * parts
        if at < of_t:
            _t(
                dy, B, g, t_partial, M, O, dy_row, dy_column, parts, part, at, column, expert, N, R, DENSE, BLOCK_R, ROWS, STEP,
                PRECISION, INTERPRETED,
            )  # fmt: skip
        else:
            _dB_and_t(
                dy, B, u, g, t_partial, dB_partial, M, O, dy_row, dy_column, tokens_per_split, stride, at - of_t, column, expert,
                factor, N, R, False, NEED_B, False, BLOCK_M, BLOCK_R, BLOCK_O, GROUP, PRECISION, INTERPRETED,
            )  # fmt: skip
    else:
        dense: tl.constexpr = DENSE and TOGETHER
        _dB_and_t(
            dy, B, u, g, t_partial, dB_partial, M, O, dy_row, dy_column, tokens_per_split, stride, at, column, expert, factor, N, R,
            NEED_T, NEED_B, dense, BLOCK_M, BLOCK_R, BLOCK_O, GROUP, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _t(
    dy, B, g, t_partial, M, O, dy_row, dy_column, parts, part, at, column, expert, N: tl.constexpr, R: tl.constexpr,
    DENSE: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """t of ROWS tokens and BLOCK_R columns, summed over a part of O of `part` columns."""
    row = at // parts * ROWS + tl.arange(0, ROWS)
    is_open = gates_of(g, row, M, expert, N, column < R) != 0.0  # (ROWS, BLOCK_R)
    if DENSE or tl.max(is_open.to(tl.int32)) > 0:
        t = tl.zeros((ROWS, BLOCK_R), tl.float32)
        first = at % parts * part
        last = tl.minimum(first + part, O)
        for o0 in range(first, last, STEP):
            o = o0 + tl.arange(0, STEP)
            tile = load_tile(dy, row, M, dy_row, o, O, dy_column)  # (ROWS, STEP)
            t = product(tile, load_tile(B, o, O, R, column, R, 1), t, PRECISION, INTERPRETED)
        store_tile(t_partial + (at % parts).to(tl.int64) * M * R, row, M, R, column, R, t)


@triton.jit
def _dB_and_t(
    dy, B, u, g, t_partial, dB_partial, M, O, dy_row, dy_column, tokens_per_split, stride, at, column, expert, factor,
    N: tl.constexpr, R: tl.constexpr, NEED_T: tl.constexpr, NEED_B: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_O: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dB of GROUP blocks of (BLOCK_O, BLOCK_R) and `tokens_per_split` tokens, one after the other, and their t, summed over all
    these columns of y. A block adds to what the one before left of t in memory, soon enough to find it in the cache."""
    groups = (O + GROUP * BLOCK_O - 1) // (GROUP * BLOCK_O)
    if NEED_T:
        t_at = t_partial + (at % groups).to(tl.int64) * M * R
    first = at // groups * tokens_per_split
    last = tl.minimum(first + tokens_per_split, M)
    for step in range(GROUP):
        o = (at % groups * GROUP + step) * BLOCK_O + tl.arange(0, BLOCK_O)
        dB = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
        if NEED_T:
            weight = load_tile(B, o, O, R, column, R, 1)  # (BLOCK_O, BLOCK_R)
            if GROUP > 1:
                tl.debug_barrier()  # other threads of this program may have written what is read of t
        for m0 in range(first, last, BLOCK_M):
            row = m0 + tl.arange(0, BLOCK_M)
            is_open = gates_of(g, row, last, expert, N, column < R) != 0.0  # (BLOCK_M, BLOCK_R)
            if DENSE or tl.max(is_open.to(tl.int32)) > 0:
                tile = load_tile(dy, row, last, dy_row, o, O, dy_column)  # (BLOCK_M, BLOCK_O)
                if NEED_T:
                    t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
                    if GROUP > 1:
                        if step > 0:
                            t = load_tile(t_at, row, last, R, column, R, 1)
                    store_tile(
                        t_at, row, last, R, column, R, product(tile, weight, t, PRECISION, INTERPRETED)
                    )
                if NEED_B:
                    # loaded again: with one expert compiled Triton cannot move `is_open` to where v is wanted
                    again = gates_of(g, row, last, expert, N, column < R)
                    v = tl.where(
                        again != 0.0, factor[None, :] * again * load_tile(u, row, last, R, column, R, 1), 0.0
                    )
                    v = v.to(B.dtype.element_ty)
                    dB = product(tl.trans(tile), v, dB, PRECISION, INTERPRETED)
        if NEED_B:
            store_tile(dB_partial + (at // groups).to(tl.int64) * stride, o, O, R, column, R, dB)


@triton.jit(do_not_specialize=_SIZES)
def gate_backward(
    t_partial, u, g, dgates, du, dh, dbias_partial, M, parts,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, ROUTED: tl.constexpr, HAS_DY: tl.constexpr,
    HAS_DGATES: tl.constexpr, NEED_b: tl.constexpr, DENSE: tl.constexpr, LD_DU: tl.constexpr, LD_DH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of tokens. du is (M, R) in x's dtype, in rows of LD_DU elements. dh (M, N), in rows of LD_DH, is the gradient
    of the logits or, without a router, of the gates; dbias_partial (tiles, N) are its sums. Values of t that were never computed
    are not looked at."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    dg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c0 in range(0, R, BLOCK_R):
        column = c0 + tl.arange(0, BLOCK_R)
        d = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if HAS_DY:
            expert, factor = experts_of(column, OFFSETS, SCALING, N)
            gate = gates_of(g, row, M, expert, N, column < R)
            is_open = gate != 0.0
            wanted = (is_open | DENSE) & (row < M)[:, None] & (column < R)[None, :]
            at = t_partial + row.to(tl.int64)[:, None] * R + column[None, :]
            t = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for _ in range(parts):
                t += tl.load(at, mask=wanted, other=0.0)
                at += M.to(tl.int64) * R
            d = tl.where(is_open, factor[None, :] * gate * t, 0.0)
            p = tl.where(wanted, factor[None, :] * t * load_tile(u, row, M, R, column, R, 1), 0.0)
            for i in range(N):  # by selection: what is not finite in one expert stays there
                of_expert = tl.sum(tl.where((expert == i)[None, :], p, 0.0), 1)
                dg = tl.where((n == i)[None, :], dg + of_expert[:, None], dg)
        store_tile(du, row, M, LD_DU, column, R, d)
    if ROUTED:
        if HAS_DGATES:
            dg += load_tile(dgates, row, M, N, n, N, 1)
        dg = tl.where(load_tile(g, row, M, N, n, N, 1) != 0.0, dg, 0.0)  # (BLOCK_M, BLOCK_N)
    store_tile(dh, row, M, LD_DH, n, N, dg)
    if NEED_b:
        tl.store(
            dbias_partial + tl.program_id(0) * N + n,
            tl.sum(tl.where((row < M)[:, None], dg, 0.0), 0),
            mask=n < N,
        )


@triton.jit(do_not_specialize=_SIZES)
def grad_input_pass(
    x, du, dh, A, W, dx, weights_partial, seed, threshold, M, K, ld_x, tokens_per_split, stride, at_W, parts, part,
    N: tl.constexpr, R: tl.constexpr, NEED_X: tl.constexpr, NEED_A: tl.constexpr, NEED_W: tl.constexpr, ROUTED: tl.constexpr,
    HAS_DY: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, MASKS: tl.constexpr, FIRSTS: tl.constexpr,
    BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Programs of two kinds: the first read x for the weights' gradients, the others write dx. BLOCKS has the blocks of all
    experts' columns as its last entry, see `block_of_columns`."""
    A_blocks: tl.constexpr = BLOCKS[MASKS] if NEED_A else 0
    blocks: tl.constexpr = A_blocks + ((N + BLOCK_R - 1) // BLOCK_R if NEED_W else 0)
    weight_programs = (K + BLOCK_K - 1) // BLOCK_K * ((M + tokens_per_split - 1) // tokens_per_split) * blocks
    if tl.program_id(0) < weight_programs:
        if blocks > 0:
            _weight_gradients(
                x, du, dh, weights_partial, seed, threshold, M, K, ld_x, tokens_per_split, stride, at_W, tl.program_id(0) // blocks,
                tl.program_id(0) % blocks, N, R, NEED_A, NEED_W, A_blocks, DROPOUT, ALIGNED, MASKS, FIRSTS, BLOCKS, BLOCK_M,
                BLOCK_R, BLOCK_K, PRECISION, INTERPRETED,
            )  # fmt: skip
    elif NEED_X:
        _dx(
            du, dh, A, W, dx, seed, threshold, M, K, parts, part, tl.program_id(0) - weight_programs, N, R, ROUTED, HAS_DY, DROPOUT,
            ALIGNED, MASKS, FIRSTS, BLOCK_N, BLOCK_R, ROWS, STEP, PRECISION, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _weight_gradients(
    x, du, dh, weights_partial, seed, threshold, M, K, ld_x, tokens_per_split, stride, at_W, at, block, N: tl.constexpr,
    R: tl.constexpr, NEED_A: tl.constexpr, NEED_W: tl.constexpr, A_BLOCKS: tl.constexpr, DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr, MASKS: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Sums over `tokens_per_split` tokens of BLOCK_R columns of du or, from block A_BLOCKS on, of dh with BLOCK_K columns of x.
    They stand in a row of `stride` values: dA (R, K), and from at_W on dWr (N, K)."""
    k_blocks = (K + BLOCK_K - 1) // BLOCK_K
    k0 = at % k_blocks * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    of_experts = block < A_BLOCKS
    of_one, end, mixture = block_of_columns(block, MASKS, FIRSTS, BLOCKS, BLOCK_R)
    columns = end if of_experts else N
    column = (of_one if of_experts else (block - A_BLOCKS) * BLOCK_R) + tl.arange(0, BLOCK_R)
    sums = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    if DROPOUT:
        key = tl.load(seed + mixture)
    first = at // k_blocks * tokens_per_split
    last = tl.minimum(first + tokens_per_split, M)
    for m0 in range(first, last, BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)
        if of_experts:
            left = load_tile(du, row, last, R, column, columns, 1)  # (BLOCK_M, BLOCK_R)
        else:
            left = load_tile(dh, row, last, N, column, N, 1).to(x.dtype.element_ty)
        tile = load_tile(x, row, last, ld_x, k, K, 1)
        if DROPOUT:
            if of_experts:
                tile = tl.where(keep(key, threshold, row, k0, K, BLOCK_K, ALIGNED), tile, tl.zeros_like(tile))
        sums = product(tl.trans(left), tile, sums, PRECISION, INTERPRETED)
    to = weights_partial + (at // k_blocks).to(tl.int64) * stride
    if of_experts:
        if NEED_A:
            store_tile(to, column, columns, K, k, K, sums)
    else:
        if NEED_W:
            store_tile(to + at_W, column, columns, K, k, K, sums)


@triton.jit
def _dx(
    du, dh, A, W, dx, seed, threshold, M, K, parts, part, at, N: tl.constexpr, R: tl.constexpr, ROUTED: tl.constexpr,
    HAS_DY: tl.constexpr, DROPOUT: tl.constexpr, ALIGNED: tl.constexpr, MASKS: tl.constexpr, FIRSTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """dx of ROWS tokens and a part of K of `part` columns, STEP at a time. Each of several MASKS goes through the part of its own
    mixture, whose du is loaded again for every step."""
    row = at // parts * ROWS + tl.arange(0, ROWS)
    first = at % parts * part
    last = tl.minimum(first + part, K)
    column, n = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    if HAS_DY and MASKS == 1:
        left = load_tile(du, row, M, R, column, R, 1)  # (ROWS, BLOCK_R): all of du where R <= BLOCK_R
    if DROPOUT and MASKS == 1:
        key = tl.load(seed)
    if ROUTED:
        dl = load_tile(dh, row, M, N, n, N, 1).to(dx.dtype.element_ty)  # (ROWS, BLOCK_N)
    for k0 in range(first, last, STEP):
        k = k0 + tl.arange(0, STEP)
        total = tl.zeros((ROWS, STEP), tl.float32)
        if HAS_DY and MASKS > 1:
            for j in tl.static_range(MASKS):
                of_one = tl.zeros((ROWS, STEP), tl.float32)
                for c0 in range(FIRSTS[j], FIRSTS[j + 1], BLOCK_R):
                    c = c0 + column
                    some = load_tile(du, row, M, R, c, FIRSTS[j + 1], 1)
                    weight = load_tile(A, c, FIRSTS[j + 1], K, k, K, 1)
                    of_one = product(some, weight, of_one, PRECISION, INTERPRETED)
                own = keep(tl.load(seed + j), threshold, row, k0, K, STEP, ALIGNED)
                total += tl.where(own, of_one, 0.0)
        elif HAS_DY:
            total = product(left, load_tile(A, column, R, K, k, K, 1), total, PRECISION, INTERPRETED)
            for c0 in range(BLOCK_R, R, BLOCK_R):
                c = c0 + column
                more = load_tile(du, row, M, R, c, R, 1)
                total = product(more, load_tile(A, c, R, K, k, K, 1), total, PRECISION, INTERPRETED)
        if DROPOUT and MASKS == 1:
            total = tl.where(keep(key, threshold, row, k0, K, STEP, ALIGNED), total, 0.0)
        if ROUTED:
            total = product(dl, load_tile(W, n, N, K, k, K, 1), total, PRECISION, INTERPRETED)
        store_tile(dx, row, M, K, k, last, total)


@triton.jit(do_not_specialize=_SIZES)
def reduce_partials(
    dB_partial, weights_partial, dbias_partial, dB, dA, drouter_weight, drouter_bias, count_y, count_x, count_b, size_y, size_x,
    at_W, N: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sums of ranges, in order, each gradient in its parameter's dtype: dB_partial (count_y, size_y) to dB, weights_partial
    (count_x, size_x) to dA and, from at_W on, dWr, dbias_partial (count_b, N) to dbr, 64 at a time. Sizes and at_W are multiples
    of BLOCK."""
    first = tl.program_id(0) * BLOCK
    i = tl.arange(0, BLOCK)
    if first < size_y:
        _reduce(dB_partial, dB, count_y, size_y, first, first + i)
    elif first < size_y + at_W:
        _reduce(weights_partial, dA, count_x, size_x, first - size_y, first - size_y + i)
    elif first < size_y + size_x:
        _reduce(weights_partial, drouter_weight, count_x, size_x, first - size_y, first - size_y - at_W + i)
    else:
        n, part = tl.arange(0, BLOCK_N), tl.arange(0, 64)
        total = tl.zeros((64, BLOCK_N), tl.float32)
        for start in range(0, count_b, 64):
            total += load_tile(dbias_partial, start + part, count_b, N, n, N, 1)
        tl.store(drouter_bias + n, tl.sum(total, 0), mask=n < N)


@triton.jit
def _reduce(ranges, to, count, size, first, at):
    total = tl.zeros(at.shape, tl.float32)
    start = ranges + first + tl.arange(0, at.shape[0])
    for _ in range(count):
        total += tl.load(start)
        start += size
    tl.store(to + at, total.to(to.dtype.element_ty))
