"""Host side of the backward pass: memory and launches. It waits for the device in trials of configurations only (`tune`)."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from rode_kernels.backends.gpu.layout import no_gradients, with_neighbouring_columns
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.backends.triton import backward_kernels, device, tune
from rode_kernels.backends.triton.tiles import (
    blocks,
    blocks_of_columns,
    columns,
    dropout,
    like,
    split_evenly,
    static,
)
from rode_kernels.operands import BackwardOperands, Gradients, Settings
from rode_kernels.passes import Needs

ADD_BLOCK = 1024
MANY_TOKENS = 32768
V_TOKENS = 16  # of a program of `gate_backward`


class OutputSums(NamedTuple):
    """Sums of `grad_output_pass`.

    Attributes:
        t: (parts, M, R), or None. dB: (ranges, `size`) of tokens, of which O R are wanted.
    """

    t: Tensor | None
    parts: int
    dB: Tensor
    ranges: int
    size: int


class InputSums(NamedTuple):
    """Results of `grad_input_pass`: dx, or None, and sums (ranges, `size`): dA, then from `at_W` on dWr."""

    dx: Tensor | None
    weights: Tensor
    ranges: int
    size: int
    at_W: int


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The backward pass, see `reference.backward`: at most three launches and one that adds ranges of tokens."""
    _, _, x, _, _, A, B, router_weight, seed = operands
    mixture = settings.mixture
    need_x, need_A, need_B, need_router, need_bias, need_gates = needs
    (M, K), O, R, N = x.shape, B.shape[0], mixture.total_rank, mixture.num_experts
    if M == 0:
        return no_gradients(operands, needs)
    x = with_neighbouring_columns(x)
    has_dy = operands.dy is not None
    need_v = need_x or need_A or need_router or need_bias or need_gates
    sums_A = has_dy and need_A
    of_y = grad_output(operands, settings, has_dy and need_v, has_dy and need_B)
    of_x = InputSums(None, of_y.dB, 1, 0, 0)
    du, dh, dbias = None, None, None
    if need_v:
        du, dh = x.new_empty(M, R), x.new_empty(M, N, dtype=torch.float32)
        dbias = gate_backward(operands, settings, of_y, du, dh, need_bias)
    if du is not None and dh is not None and (sums_A or need_router or need_x):
        wanted = need_x, sums_A, need_router
        A_and_W = like(x, A), like(x, router_weight)
        of_x = grad_input(x, du, dh, *A_and_W, seed, settings, wanted, (has_dy, O))
    dB = result(x, need_B, has_dy, B.dtype, O, R)
    dA = result(x, need_A, sums_A, A.dtype, R, K)
    drouter_weight = drouter_bias = None
    if router_weight is not None:
        drouter_weight = result(x, need_router, True, router_weight.dtype, N, K)
    drouter_bias = result(x, need_bias, True, torch.float32, N)
    reduce(x, N, of_y, of_x, dbias, (dB, dA, drouter_weight, drouter_bias))
    return Gradients(of_x.dx, dA, dB, drouter_weight, drouter_bias, dh if need_gates else None)


def _room(wanted: bool, count: int) -> int:
    """Sums over ranges of tokens: dB, and dA with dWr, each from a multiple of ADD_BLOCK on."""
    return divide_up(count, ADD_BLOCK) * ADD_BLOCK if wanted else 0


def _shape_class(x: Tensor, out_features: int) -> tuple[torch.dtype, int, int, int]:
    return x.dtype, x.shape[1], out_features, triton.next_power_of_2(x.shape[0])


def grad_output(operands: BackwardOperands, settings: Settings, need_t: bool, need_B: bool) -> OutputSums:
    """The launch over dy: parts of t, and of dB."""
    dy, _, x, u, g, _, B, _, _ = operands
    mixture, dropout_p, dense = settings
    M, O, R = x.shape[0], B.shape[0], mixture.total_rank
    most, B = triton.next_power_of_2(M), like(x, B)
    size, fills = blocks(M, R, mixture.num_experts, x.element_size()), device.multiprocessors(x)
    R_blocks, o_blocks, row_tiles = divide_up(R, size.r), divide_up(O, size.o), divide_up(M, size.rows)
    # Parts of t cost as many bytes as there are tokens, ranges of dB as many as there are weights: with many tokens a program takes
    # several blocks of O, so that there are fewer parts and more ranges.
    group = 4 if size.together and most >= MANY_TOKENS and o_blocks >= 8 else 1
    o_blocks = divide_up(o_blocks, group)
    # about one program a multiprocessor
    count_y, per_split_y = split_evenly(M, size.tokens, _ranges(fills, o_blocks * R_blocks))
    size_y = _room(need_B, O * R)
    dB_partial = x.new_empty(count_y, size_y, dtype=torch.float32)
    if size.together:  # a part of t is what a program's columns of y give
        parts, part = o_blocks, group * size.o
    else:
        # for the shape class, as in forward: they decide the bits of a token's dx
        parts, part = split_evenly(O, size.k, fills // (divide_up(most, size.rows) * R_blocks))
    t = x.new_empty(parts, M, R, dtype=torch.float32) if need_t else None
    if dy is not None and (need_t or need_B):
        programs = o_blocks * count_y if size.together or need_B else 0
        if need_t and not size.together:
            programs += row_tiles * parts
        constants = {
            **static(x, mixture),
            **columns(mixture, dropout_p),
            **dict(TOGETHER=size.together, NEED_T=need_t, NEED_B=need_B, DENSE=dense),
            **dict(BLOCK_M=size.tokens, BLOCK_R=size.r, BLOCK_O=size.o),
            **dict(GROUP=group, ROWS=size.rows, STEP=size.k),
        }
        arguments = (dy, B, u, g, t, dB_partial, M, O, *dy.stride(), parts, part, per_split_y, size_y)
        # as a launch specialises, not the very distances, in which the number of tokens may stand
        strides = tuple(s if s < 2 else s % 16 == 0 for s in dy.stride())
        grid, dy_class = (programs * R_blocks,), (*_shape_class(x, O), strides)
        options = tune.of_backward(8)
        tune.launch(backward_kernels, "grad_output_pass", grid, arguments, constants, dy_class, options, x)
    return OutputSums(t, parts, dB_partial, count_y, size_y)


def gate_backward(
    operands: BackwardOperands, settings: Settings, of_y: OutputSums, du: Tensor, dh: Tensor, need_bias: bool
) -> Tensor | None:
    """Writes du (M, R) and dh (M, N), which may be columns of something wider; gives sums of dh over tiles of tokens."""
    x, mixture = operands.x, settings.mixture
    M, R, N = x.shape[0], mixture.total_rank, mixture.num_experts
    size, tiles = blocks(M, R, N, x.element_size()), divide_up(M, V_TOKENS)
    dbias_partial = x.new_empty(tiles, N, dtype=torch.float32) if need_bias else None
    constants = {
        **columns(mixture, settings.dropout_p),
        **dict(N=N, R=R, ROUTED=operands.router_weight is not None, HAS_DY=of_y.t is not None),
        **dict(HAS_DGATES=operands.dgates is not None, NEED_b=need_bias, DENSE=settings.dense),
        **dict(LD_DU=du.stride(0), LD_DH=dh.stride(0)),
        **dict(BLOCK_M=V_TOKENS, BLOCK_N=size.n, BLOCK_R=size.r),
    }
    arguments = (of_y.t, operands.u, operands.g, operands.dgates, du, dh, dbias_partial, M, of_y.parts)
    t_class, options = (*_shape_class(x, operands.B.shape[0]), of_y.parts), tune.of_backward(4)
    tune.launch(backward_kernels, "gate_backward", (tiles,), arguments, constants, t_class, options, x)
    return dbias_partial


def grad_input(
    x: Tensor,
    du: Tensor,
    dh: Tensor,
    A: Tensor,
    W: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, bool, bool],
    of_y: tuple[bool, int],
    own: tuple[int, ...] = (),
) -> InputSums:
    """The launch over x.

    Args:
        A, W: in x's dtype. wanted: dx, and sums for dA and dWr. of_y: whether there is any dy, and out_features.
        own: as `launch_forward.shrink` takes it.
    """
    need_x, need_A, need_router = wanted
    mixture, dropout_p, _ = settings
    (M, K), R, N = x.shape, mixture.total_rank, mixture.num_experts
    has_dy, O = of_y
    firsts = own or (0, R)
    widest = max(end - first for first, end in pairwise(firsts))
    size, fills = blocks(M, widest, N, x.element_size()), device.multiprocessors(x)
    threshold, drops = dropout(x, dropout_p)
    k_blocks, row_tiles = divide_up(K, size.x), divide_up(M, size.rows)
    of_columns = blocks_of_columns(firsts, size.r)
    A_blocks = of_columns["BLOCKS"][-1] if need_A else 0
    W_blocks = divide_up(N, size.r) if need_router else 0
    at_W = _room(need_A, R * K)
    size_x = at_W + _room(need_router, N * K)
    count_x, per_split_x = split_evenly(
        M, size.tokens, _ranges(fills, k_blocks * max(1, A_blocks + W_blocks))
    )
    weights_partial = x.new_empty(count_x, size_x, dtype=torch.float32)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    # parts of K fill the device, together with the programs of the weights' gradients if there are any
    parts_of_K, part_of_K = split_evenly(K, size.k, fills // row_tiles)
    programs = row_tiles * parts_of_K if need_x else 0
    programs += k_blocks * (A_blocks + W_blocks) * count_x
    constants = {
        **static(x, mixture),
        **drops,
        **of_columns,
        **dict(NEED_X=need_x, NEED_A=need_A, NEED_W=need_router, ROUTED=W is not None, HAS_DY=has_dy),
        **dict(BLOCK_M=size.tokens, BLOCK_N=size.n, BLOCK_R=size.r, BLOCK_K=size.x),
        **dict(ROWS=size.rows, STEP=size.k),
    }
    tensors = (x, du, dh, A, W, dx, weights_partial, seed)
    sizes = (M, K, x.stride(0), per_split_x, size_x, at_W, parts_of_K, part_of_K)
    grid, arguments, options = (programs,), (*tensors, threshold, *sizes), tune.of_backward(8, 4)
    shape_class = _shape_class(x, O)
    tune.launch(backward_kernels, "grad_input_pass", grid, arguments, constants, shape_class, options, x)
    return InputSums(dx, weights_partial, count_x, size_x, at_W)


def result(
    x: Tensor, wanted: bool, summed: bool, dtype: torch.dtype | None, rows: int, columns: int = 0
) -> Tensor | None:
    """With room for what whole blocks of `reduce_partials` write, or zeros where nothing is summed."""
    shape = (rows, columns) if columns else (rows,)
    if not wanted:
        return None
    if not summed:
        return x.new_zeros(shape, dtype=dtype)
    elements = torch.Size(shape).numel()
    return x.new_empty(divide_up(elements, ADD_BLOCK) * ADD_BLOCK, dtype=dtype)[:elements].view(shape)


def reduce(
    x: Tensor,
    experts: int,
    of_y: OutputSums,
    of_x: InputSums,
    dbias: Tensor | None,
    results: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Adds up the ranges: writes dB, dA, dWr and dbr, those that are there."""
    reduce_blocks = (of_y.size + of_x.size) // ADD_BLOCK + (dbias is not None)
    if reduce_blocks == 0:
        return
    weights, tiles = of_x.weights, divide_up(x.shape[0], V_TOKENS)
    # what nobody asks for has no program, but its pointer must have a type
    targets = [weights if t is None else t for t in results]
    partials = (of_y.dB, weights, weights if dbias is None else dbias)
    arguments = (*partials, *targets, of_y.ranges, of_x.ranges, tiles, of_y.size, of_x.size, of_x.at_W)
    size = max(16, triton.next_power_of_2(experts))
    constants = dict(N=experts, BLOCK=ADD_BLOCK, BLOCK_N=size)
    types = (_shape_class(x, 0), tuple(None if t is None else t.dtype for t in results))
    options = tune.of_backward(4)[:1]
    tune.launch(
        backward_kernels, "reduce_partials", (reduce_blocks,), arguments, constants, types, options, x
    )


def _ranges(multiprocessors: int, programs: int) -> int:
    """Ranges of tokens, of which each takes so many programs, that fill the device: the fewest that take at most 15 % longer than
    the best number, for every range costs memory."""
    most = max(1, 2 * multiprocessors // programs)
    time = {n: -(-n * programs // multiprocessors) / n for n in range(1, most + 1)}
    return next(n for n in time if time[n] <= 1.15 * min(time.values()))
