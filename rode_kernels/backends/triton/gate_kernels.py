"""The kernels between the products of the gemm path (`rode_kernels.backends.gpu.gemm_path`).

forward:  sums = x [A; Wr]^T -> g, u, v        backward:  t = dy B -> v, D = [du dh 0], dh
"""

from __future__ import annotations

import triton
import triton.language as tl

from rode_kernels.backends.triton.common import experts_of, gates_of, load_tile, store_tile

_SIZES = ["M"]


@triton.jit(do_not_specialize=_SIZES)
def apply_gates(
    sums, bias, g, u, v, M,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, PITCH: tl.constexpr,
    ROUTED: tl.constexpr, HAS_BIAS: tl.constexpr, DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of tokens, blocks of packed columns. sums (M, COLUMNS) holds u, then the logits; v is (M, PITCH). Each
    program makes the gates of its columns from the logits; those of the first block write g."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    expert, factor = experts_of(column, OFFSETS, SCALING, N)
    if ROUTED:
        gate = _gates(sums + R, bias, row, M, COLUMNS, expert, N, column < R, HAS_BIAS)
        if tl.program_id(1) == 0:
            n = tl.arange(0, BLOCK_N)
            store_tile(g, row, M, N, n, N, _gates(sums + R, bias, row, M, COLUMNS, n, N, n < N, HAS_BIAS))
    else:
        gate = gates_of(g, row, M, expert, N, column < R)  # (BLOCK_M, BLOCK_R)
    is_open = gate != 0.0
    value = load_tile(sums, row, M, COLUMNS, column, R, 1)
    store_tile(u, row, M, R, column, R, tl.where(is_open | DENSE, value, 0.0))
    store_tile(v, row, M, PITCH, column, PITCH, tl.where(is_open, factor[None, :] * gate * value, 0.0))


@triton.jit
def _gates(
    logits, bias, row, M, COLUMNS: tl.constexpr, expert, N: tl.constexpr, inside_column, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """relu(logits[row, expert] + bias[expert]), 0 outside; NaN is not swallowed."""
    inside = (row < M)[:, None] & inside_column[None, :]
    logit = tl.load(logits + row.to(tl.int64)[:, None] * COLUMNS + expert[None, :], mask=inside, other=0.0)
    if HAS_BIAS:
        logit += tl.load(bias + expert, mask=inside_column, other=0.0)[None, :]
    return tl.where((logit <= 0.0) | (~inside), 0.0, logit)


@triton.jit(do_not_specialize=_SIZES)
def apply_gates_backward(
    t, u, g, dgates, v, D, dh, M,
    OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, PITCH: tl.constexpr,
    ROUTED: tl.constexpr, HAS_DY: tl.constexpr, HAS_DGATES: tl.constexpr, NEED_V: tl.constexpr, NEED_D: tl.constexpr,
    DENSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of tokens. t and v are (M, PITCH), D (M, COLUMNS)."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    dg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for c0 in range(0, PITCH, BLOCK_R):
        column = c0 + tl.arange(0, BLOCK_R)
        expert, factor = experts_of(column, OFFSETS, SCALING, N)
        gate = gates_of(g, row, M, expert, N, column < R)  # (BLOCK_M, BLOCK_R)
        is_open = gate != 0.0
        wanted = (is_open | DENSE) & (row < M)[:, None] & (column < R)[None, :]
        saved = tl.load(u + row.to(tl.int64)[:, None] * R + column[None, :], mask=wanted, other=0.0)
        if NEED_V:
            store_tile(
                v, row, M, PITCH, column, PITCH, tl.where(is_open, factor[None, :] * gate * saved, 0.0)
            )
        du = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        if HAS_DY:
            of_t = tl.load(t + row.to(tl.int64)[:, None] * PITCH + column[None, :], mask=wanted, other=0.0)
            du = tl.where(is_open, factor[None, :] * gate * of_t, 0.0)
            product = tl.where(wanted, factor[None, :] * of_t * saved, 0.0)
            for i in range(N):  # by selection: what is not finite in one expert stays there
                of_expert = tl.sum(tl.where((expert == i)[None, :], product, 0.0), 1)
                dg = tl.where((n == i)[None, :], dg + of_expert[:, None], dg)
        if NEED_D:
            store_tile(D, row, M, COLUMNS, column, R, du)
    if HAS_DGATES:
        dg += load_tile(dgates, row, M, N, n, N, 1)
    if ROUTED:
        dg = tl.where(load_tile(g, row, M, N, n, N, 1) != 0.0, dg, 0.0)
    store_tile(dh, row, M, N, n, N, dg)
    if NEED_D:
        of_router = dg if ROUTED else tl.zeros_like(dg)
        store_tile(D + R, row, M, COLUMNS, n, COLUMNS - R, of_router)  # zeros from N on, where g is 0
