"""Functions that every Triton kernel uses: the expert of a column, dropout's bits, products.

All kernels see packed columns: expert i owns columns OFFSETS[i] .. OFFSETS[i + 1] of A's rows, B's columns, u and v, whatever its
rank. Column blocks have 16 columns at least, so that a product's K is what a GPU's matrix instructions take.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def experts_of(column, OFFSETS: tl.constexpr, SCALING: tl.constexpr, N: tl.constexpr):
    """The expert that owns each column, and its scaling; the last one where no expert does."""
    expert = tl.zeros_like(column)
    factor = tl.zeros_like(column).to(tl.float32) + SCALING[0]
    for i in tl.static_range(1, N):
        expert = tl.where(column >= OFFSETS[i], i, expert)
        factor = tl.where(column >= OFFSETS[i], SCALING[i], factor)
    return expert, factor


@triton.jit
def keep(seed, threshold, row, first, K, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr):
    """The elements (row, first .. first + BLOCK_K) of x dropout keeps. Philox4x32-10: element e = row K + k uses word e & 3 of
    counter e >> 2; it stays where that is at least the threshold. ALIGNED: K is a multiple of 4, and so is `first`."""
    if ALIGNED:
        quarter = tl.arange(0, BLOCK_K // 4)
        counter = (row.to(tl.int64)[:, None] * K + first) // 4 + quarter[None, :]  # (BLOCK_M, BLOCK_K / 4)
        w0, w1, w2, w3 = tl.randint4x(seed, counter)
        # (.., .., 2, 2), the last index runs over (w0, w1), then (w2, w3)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        word = tl.reshape(words, (row.shape[0], BLOCK_K))
    else:
        element = row.to(tl.int64)[:, None] * K + first + tl.arange(0, BLOCK_K)[None, :]
        w0, w1, w2, w3 = tl.randint4x(seed, element >> 2)
        which = element & 3
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
    return word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold


@triton.jit
def block_of_columns(
    block, MASKS: tl.constexpr, FIRSTS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_R: tl.constexpr
):
    """A block of the experts' columns: its first one, where the columns of its mixture end, and the mixture. Where MASKS is more
    than 1, mixtures have blocks of their own, from BLOCKS[j] on, and their columns begin at FIRSTS[j]. Otherwise all are one."""
    first = block * BLOCK_R
    end = FIRSTS[1]
    mixture = 0
    for j in tl.static_range(1, MASKS):
        first = FIRSTS[j] + (block - BLOCKS[j]) * BLOCK_R if block >= BLOCKS[j] else first
        end = FIRSTS[j + 1] if block >= BLOCKS[j] else end
        mixture = j if block >= BLOCKS[j] else mixture
    return first, end, mixture


@triton.jit
def product(a, b, total, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """total + a b, summed in float32. The interpreter multiplies bfloat16 as 16-bit integers, so there operands are float32."""
    tl.static_assert(a.shape[1] >= 16)  # the interpreter multiplies less, no GPU does
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def load_tile(at, row, rows, row_step, column, columns, column_step):
    """(rows, columns) of a matrix, 0 outside of it. 64-bit offsets: x alone can have more than 2^31 elements."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(
        at + row.to(tl.int64)[:, None] * row_step + column.to(tl.int64)[None, :] * column_step,
        mask=inside,
        other=0.0,
    )


@triton.jit
def store_tile(at, row, rows, row_step, column, columns, value):
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(
        at + row.to(tl.int64)[:, None] * row_step + column[None, :],
        value.to(at.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def gates_of(g, row, rows, expert, N: tl.constexpr, inside_column):
    """g[row, expert] of each column (BLOCK_M, BLOCK_R), 0 outside."""
    inside = (row < rows)[:, None] & inside_column[None, :]
    return tl.load(g + row.to(tl.int64)[:, None] * N + expert[None, :], mask=inside, other=0.0)
