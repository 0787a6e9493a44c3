"""Host side of the backward pass: memory and launches. It waits for the device in trials of configurations only (`tune`)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rode_kernels.gpu import with_neighbouring_columns
from rode_kernels.mixture import Mixture
from rode_kernels.triton import backward_kernels, device, tune
from rode_kernels.triton.blocks import blocks, columns, divide_up, dropout, like, share_out, static

ADD_BLOCK = 1024


def backward(
    dy: Tensor | None,
    dgates: Tensor | None,
    x: Tensor,
    u: Tensor,
    g: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    seed: Tensor | None,
    mixture: Mixture,
    dropout_p: float,
    dense: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """As `reference.backward`; at most three launches and one that adds ranges of tokens."""
    need_x, need_A, need_B, need_router, need_bias, need_gates = needs
    (M, K), O, R, N = x.shape, B.shape[0], mixture.total_rank, mixture.num_experts
    dtypes = (A.dtype, B.dtype, None if router_weight is None else router_weight.dtype)
    if M == 0:
        return (
            x.new_zeros(M, K) if need_x else None,
            A.new_zeros(A.shape) if need_A else None,
            B.new_zeros(B.shape) if need_B else None,
            router_weight.new_zeros(N, K) if need_router else None,
            g.new_zeros(N) if need_bias else None,
            g.new_zeros(M, N) if need_gates else None,
        )
    x = with_neighbouring_columns(x)
    A, W, B = like(x, A, router_weight, B)
    most = triton.next_power_of_2(M)
    size, fills = blocks(M, R, N, x.element_size()), device.multiprocessors(x)
    shape_class = (x.dtype, K, O, most)
    threshold, drops = dropout(x, dropout_p)
    routed, R_blocks = W is not None, divide_up(R, size.r)
    o_blocks, k_blocks, row_tiles = divide_up(O, size.o), divide_up(K, size.x), divide_up(M, size.rows)

    # What ranges of tokens add up to: dB, dA, dWr, dbr, each from a multiple of ADD_BLOCK on.
    starts, stride = [], 0
    for wanted, count in ((need_B, O * R), (need_A, R * K), (need_router, N * K), (need_bias, N)):
        starts.append(stride)
        stride += divide_up(count, ADD_BLOCK) * ADD_BLOCK if wanted else 0
    _, at_A, at_W, at_b = starts
    A_blocks = R_blocks if need_A else 0
    W_blocks = divide_up(N, size.r) if need_router or need_bias else 0
    # one program a multiprocessor
    count_y, share_y = share_out(M, size.tokens, fills // (o_blocks * R_blocks))
    count_x, share_x = share_out(M, size.tokens, fills // (k_blocks * max(1, A_blocks + W_blocks)))
    ranges = x.new_empty(max(count_y, count_x), stride, dtype=torch.float32)

    need_weights = need_A or need_router or need_bias
    need_v = need_x or need_weights or need_gates
    need_t = dy is not None and need_v
    if size.together:  # a part of t is what a program's columns of y give
        parts, part = o_blocks, size.o
    else:
        # for the shape class, as in forward: they decide the bits of a token's dx
        parts, part = share_out(O, size.k, fills // (divide_up(most, size.rows) * R_blocks))
    t = x.new_empty(parts, M, R, dtype=torch.float32) if need_t else None
    if dy is not None and (need_t or need_B):
        programs = o_blocks * count_y if size.together or need_B else 0
        if need_t and not size.together:
            programs += row_tiles * parts
        constants = {
            **static(x, mixture),
            **columns(mixture, dropout_p),
            **dict(TOGETHER=size.together, NEED_T=need_t, NEED_B=need_B, DENSE=dense),
            **dict(BLOCK_M=size.tokens, BLOCK_R=size.r, BLOCK_O=size.o, ROWS=size.rows, STEP=size.k),
        }

        def through_y(_: Tensor, **chosen) -> None:
            backward_kernels.through_y[(programs * R_blocks,)](
                *(dy, B, u, g, t, ranges, M, O, dy.stride(0), dy.stride(1), parts, part, share_y, stride),
                **constants,
                **chosen,
            )

        tune.tuned("through_y", constants, (*shape_class, dy.stride()), tune.of_backward(8), through_y, x)
    elif need_B:
        ranges[:count_y, : O * R] = 0.0
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    if need_v:
        du, dh = x.new_empty(M, R), x.new_empty(M, N, dtype=torch.float32)
        dgates = None if dgates is None else dgates.contiguous()
        of_v = {
            **columns(mixture, dropout_p),
            **dict(N=N, R=R, ROUTED=routed, HAS_DY=need_t, HAS_DGATES=dgates is not None, DENSE=dense),
            **dict(BLOCK_M=16, BLOCK_N=size.n, BLOCK_R=size.r),
        }

        def through_v(_: Tensor, **chosen) -> None:
            backward_kernels.through_v[(divide_up(M, 16),)](
                t, u, g, dgates, du, dh, M, parts, **of_v, **chosen
            )

        tune.tuned("through_v", of_v, (*shape_class, parts), tune.of_backward(4), through_v, x)
    if need_weights or need_x:
        # parts of K fill the device, together with the programs of the weights' gradients if there are any
        parts_of_K, of_K = share_out(K, size.k, fills // row_tiles)
        programs = row_tiles * parts_of_K if need_x else 0
        programs += k_blocks * (A_blocks + W_blocks) * count_x
        of_x = {
            **static(x, mixture),
            **drops,
            **dict(
                NEED_X=need_x,
                NEED_A=need_A,
                NEED_W=need_router,
                NEED_b=need_bias,
                ROUTED=routed,
                HAS_DY=need_t,
            ),
            **dict(
                BLOCK_M=size.tokens,
                BLOCK_N=size.n,
                BLOCK_R=size.r,
                BLOCK_K=size.x,
                ROWS=size.rows,
                STEP=size.k,
            ),
        }
        tensors = (x, du, dh, A, W, dx, ranges, seed)

        def through_x(_: Tensor, **chosen) -> None:
            backward_kernels.through_x[(programs,)](
                *(
                    *tensors,
                    threshold,
                    M,
                    K,
                    x.stride(0),
                    share_x,
                    stride,
                    at_A,
                    at_W,
                    at_b,
                    parts_of_K,
                    of_K,
                ),
                **of_x,
                **chosen,
            )

        tune.tuned("through_x", of_x, shape_class, tune.of_backward(8, 4), through_x, x)

    def summed(wanted: bool, dtype: torch.dtype | None, first: int, end: int) -> Tensor | None:
        return x.new_empty(end - first, dtype=dtype) if wanted else None

    sums = [
        summed(need_B, dtypes[1], 0, at_A),
        summed(need_A, dtypes[0], at_A, at_W),
        summed(need_router, dtypes[2], at_W, at_b),
        summed(need_bias, torch.float32, at_b, stride),
    ]
    if stride > 0:
        # a gradient that nobody asks for has no program, but its pointer must have a type
        targets = [ranges if sums[i] is None else sums[i] for i in (1, 0, 2, 3)]
        backward_kernels.add[(stride // ADD_BLOCK,)](
            *(ranges, *targets, count_y, count_x, stride, at_A, at_W, at_b), BLOCK=ADD_BLOCK, **tune.ALWAYS
        )

    def shaped(values: Tensor | None, *shape: int) -> Tensor | None:
        return None if values is None else values[: torch.Size(shape).numel()].view(shape)

    return (
        dx,
        shaped(sums[1], R, K),
        shaped(sums[0], O, R),
        shaped(sums[2], N, K),
        shaped(sums[3], N),
        dh if need_gates else None,
    )
