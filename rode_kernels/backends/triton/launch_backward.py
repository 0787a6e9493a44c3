"""Host side of the backward pass: memory and launches. It waits for the device in trials of configurations only (`tune`)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rode_kernels.backends.gpu.layout import no_gradients, with_neighbouring_columns
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.backends.triton import backward_kernels, device, tune
from rode_kernels.backends.triton.tiles import blocks, columns, dropout, like, split_evenly, static
from rode_kernels.operands import BackwardOperands, Gradients, Settings
from rode_kernels.passes import Needs

ADD_BLOCK = 1024
MANY_TOKENS = 32768
V_TOKENS = 16  # of a program of `gate_backward`


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The backward pass, see `reference.backward`: at most three launches and one that adds ranges of tokens."""
    dy, dgates, x, u, g, A, B, router_weight, seed = operands
    mixture, dropout_p, dense = settings
    need_x, need_A, need_B, need_router, need_bias, need_gates = needs
    (M, K), O, R, N = x.shape, B.shape[0], mixture.total_rank, mixture.num_experts
    dtypes = (A.dtype, B.dtype, None if router_weight is None else router_weight.dtype)
    if M == 0:
        return no_gradients(operands, needs)
    x = with_neighbouring_columns(x)
    A, W, B = like(x, A), like(x, router_weight), like(x, B)
    most = triton.next_power_of_2(M)
    size, fills = blocks(M, R, N, x.element_size()), device.multiprocessors(x)
    shape_class = (x.dtype, K, O, most)
    threshold, drops = dropout(x, dropout_p)
    routed, R_blocks = W is not None, divide_up(R, size.r)
    o_blocks, k_blocks, row_tiles = divide_up(O, size.o), divide_up(K, size.x), divide_up(M, size.rows)

    need_weights = need_A or need_router
    need_v = need_x or need_weights or need_bias or need_gates
    has_dy = dy is not None
    need_t, sums_B, sums_A = has_dy and need_v, has_dy and need_B, has_dy and need_A

    # Sums over ranges of tokens: dB, and dA with dWr, each from a multiple of ADD_BLOCK on.
    def room(wanted: bool, count: int) -> int:
        return divide_up(count, ADD_BLOCK) * ADD_BLOCK if wanted else 0

    size_y, at_W = room(sums_B, O * R), room(sums_A, R * K)
    size_x = at_W + room(need_router, N * K)
    A_blocks = R_blocks if sums_A else 0
    W_blocks = divide_up(N, size.r) if need_router else 0
    # Parts of t cost as many bytes as there are tokens, ranges of dB as many as there are weights: with many tokens a program takes
    # several blocks of O, so that there are fewer parts and more ranges.
    group = 4 if size.together and most >= MANY_TOKENS and o_blocks >= 8 else 1
    o_blocks = divide_up(o_blocks, group)
    # about one program a multiprocessor
    count_y, per_split_y = split_evenly(M, size.tokens, _ranges(fills, o_blocks * R_blocks))
    count_x, per_split_x = split_evenly(
        M, size.tokens, _ranges(fills, k_blocks * max(1, A_blocks + W_blocks))
    )
    dB_partial = x.new_empty(count_y, size_y, dtype=torch.float32)
    weights_partial = x.new_empty(count_x, size_x, dtype=torch.float32)
    tiles = divide_up(M, V_TOKENS)
    dbias_partial = x.new_empty(tiles, N, dtype=torch.float32) if need_bias else None

    if size.together:  # a part of t is what a program's columns of y give
        parts, part = o_blocks, group * size.o
    else:
        # for the shape class, as in forward: they decide the bits of a token's dx
        parts, part = split_evenly(O, size.k, fills // (divide_up(most, size.rows) * R_blocks))
    t = x.new_empty(parts, M, R, dtype=torch.float32) if need_t else None
    if dy is not None and (need_t or sums_B):
        programs = o_blocks * count_y if size.together or sums_B else 0
        if need_t and not size.together:
            programs += row_tiles * parts
        constants = {
            **static(x, mixture),
            **columns(mixture, dropout_p),
            **dict(TOGETHER=size.together, NEED_T=need_t, NEED_B=sums_B, DENSE=dense),
            **dict(BLOCK_M=size.tokens, BLOCK_R=size.r, BLOCK_O=size.o),
            **dict(GROUP=group, ROWS=size.rows, STEP=size.k),
        }
        arguments = (dy, B, u, g, t, dB_partial, M, O, *dy.stride(), parts, part, per_split_y, size_y)
        # as a launch specialises, not the very distances, in which the number of tokens may stand
        strides = tuple(s if s < 2 else s % 16 == 0 for s in dy.stride())
        grid, dy_class, options = (programs * R_blocks,), (*shape_class, strides), tune.of_backward(8)
        tune.launch(backward_kernels, "grad_output_pass", grid, arguments, constants, dy_class, options, x)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    if need_v:
        du, dh = x.new_empty(M, R), x.new_empty(M, N, dtype=torch.float32)
        constants = {
            **columns(mixture, dropout_p),
            **dict(N=N, R=R, ROUTED=routed, HAS_DY=need_t, HAS_DGATES=dgates is not None),
            **dict(NEED_b=need_bias, DENSE=dense),
            **dict(BLOCK_M=V_TOKENS, BLOCK_N=size.n, BLOCK_R=size.r),
        }
        arguments = (t, u, g, dgates, du, dh, dbias_partial, M, parts)
        t_class, options = (*shape_class, parts), tune.of_backward(4)
        tune.launch(backward_kernels, "gate_backward", (tiles,), arguments, constants, t_class, options, x)
    if A_blocks + W_blocks > 0 or need_x:
        # parts of K fill the device, together with the programs of the weights' gradients if there are any
        parts_of_K, part_of_K = split_evenly(K, size.k, fills // row_tiles)
        programs = row_tiles * parts_of_K if need_x else 0
        programs += k_blocks * (A_blocks + W_blocks) * count_x
        constants = {
            **static(x, mixture),
            **drops,
            **dict(NEED_X=need_x, NEED_A=sums_A, NEED_W=need_router, ROUTED=routed, HAS_DY=need_t),
            **dict(BLOCK_M=size.tokens, BLOCK_N=size.n, BLOCK_R=size.r, BLOCK_K=size.x),
            **dict(ROWS=size.rows, STEP=size.k),
        }
        tensors = (x, du, dh, A, W, dx, weights_partial, seed)
        sizes = (M, K, x.stride(0), per_split_x, size_x, at_W, parts_of_K, part_of_K)
        grid, arguments, options = (programs,), (*tensors, threshold, *sizes), tune.of_backward(8, 4)
        tune.launch(backward_kernels, "grad_input_pass", grid, arguments, constants, shape_class, options, x)

    def result(wanted: bool, summed: bool, dtype: torch.dtype | None, *shape: int) -> Tensor | None:
        """With room for what whole blocks of `reduce_partials` write, or zeros where nothing is summed."""
        if not wanted:
            return None
        if not summed:
            return x.new_zeros(shape, dtype=dtype)
        elements = torch.Size(shape).numel()
        return x.new_empty(divide_up(elements, ADD_BLOCK) * ADD_BLOCK, dtype=dtype)[:elements].view(shape)

    dB = result(need_B, sums_B, dtypes[1], O, R)
    dA = result(need_A, sums_A, dtypes[0], R, K)
    drouter_weight = result(need_router, need_router, dtypes[2], N, K)
    drouter_bias = result(need_bias, need_bias, torch.float32, N)
    reduce_blocks = (size_y + size_x) // ADD_BLOCK + need_bias
    if reduce_blocks > 0:
        # what nobody asks for has no program, but its pointer must have a type
        targets = [weights_partial if t is None else t for t in (dB, dA, drouter_weight, drouter_bias)]
        partials = (dB_partial, weights_partial, weights_partial if dbias_partial is None else dbias_partial)
        arguments = (*partials, *targets, count_y, count_x, tiles, size_y, size_x, at_W)
        constants = dict(N=N, BLOCK=ADD_BLOCK, BLOCK_N=size.n)
        grid, types, options = (reduce_blocks,), (shape_class, dtypes), tune.of_backward(4)[:1]
        tune.launch(backward_kernels, "reduce_partials", grid, arguments, constants, types, options, x)
    return Gradients(dx, dA, dB, drouter_weight, drouter_bias, dh if need_gates else None)


def _ranges(multiprocessors: int, programs: int) -> int:
    """Ranges of tokens, of which each takes so many programs, that fill the device: the fewest that take at most 15 % longer than
    the best number, for every range costs memory."""
    most = max(1, 2 * multiprocessors // programs)
    time = {n: -(-n * programs // multiprocessors) / n for n in range(1, most + 1)}
    return next(n for n in time if time[n] <= 1.15 * min(time.values()))
