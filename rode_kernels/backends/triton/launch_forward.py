"""Host side of the forward pass: memory and launches. It waits for the device in trials of configurations only (`tune`)."""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
from torch import Tensor

from rode_kernels.backends.gpu.layout import with_neighbouring_columns
from rode_kernels.backends.gpu.planner import plan_forward
from rode_kernels.backends.gpu.plans import Plan, ProblemShape, divide_up
from rode_kernels.backends.triton import device, forward_kernels, tune
from rode_kernels.backends.triton.tiles import (
    blocks,
    blocks_of_columns,
    columns,
    columns_of_expand,
    dropout,
    like,
    split_evenly,
    static,
)
from rode_kernels.operands import ForwardOperands, Settings
from rode_kernels.passes import Outputs


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
    """The forward pass, see `reference.forward`; tiles of tokens with nothing open are skipped."""
    x, A, B, router_weight, router_bias, gates, base, seed = operands
    mixture, dropout_p, dense = settings
    (M, K), O, R, N = x.shape, B.shape[0], mixture.total_rank, mixture.num_experts
    x, base = with_neighbouring_columns(x), with_neighbouring_columns(base)
    y = base if inplace and base is not None else x.new_empty(M, O)
    u = x.new_empty(M, R, dtype=torch.float32)
    routed = router_weight is not None
    g = x.new_empty(M, N, dtype=torch.float32) if gates is None else gates
    if M > 0:
        A, W, B = like(x, A), like(x, router_weight), like(x, B)
        # parts of K decide the bits: for the shape class, not for the very number of tokens
        most = triton.next_power_of_2(M)
        call = ProblemShape(most, K, O, R, N, x.element_size(), routed=routed)
        plan = plan_forward(call, device.multiprocessors(x))
        size = blocks(M, R, N, x.element_size())
        threshold, drops = dropout(x, dropout_p)
        of_sums = {**static(x, mixture), **drops}
        of_y = {
            **static(x, mixture),
            **columns(mixture, dropout_p),
            **dict(ROUTED=routed, HAS_BIAS=router_bias is not None, HAS_BASE=base is not None),
            **dict(INPLACE=inplace, DENSE=dense),
        }
        shape_class = (x.dtype, K, O, most)
        if plan.fused and size.r >= R:
            constants = {**of_sums, **of_y, **dict(BLOCK_N=size.n, BLOCK_R=size.r, BLOCK_K=size.k)}

            def fused(to: Tensor, BLOCK_M: int, **chosen: int) -> None:
                source = to if inplace else base
                ld_base = 0 if source is None else source.stride(0)
                forward_kernels.fused[(divide_up(M, BLOCK_M),)](
                    *(x, A, W, B, router_bias, g, source, to, u, seed, threshold, M, K, O, x.stride(0)),
                    *(ld_base, to.stride(0)),  # a trial's copy has its own
                    **constants,
                    BLOCK_M=BLOCK_M,
                    **chosen,
                )

            options = tune.of_forward(most, x.element_size(), size.r)
            tune.tuned("fused", constants, shape_class, options, fused, y, scratch=inplace)
        else:
            partial, parts = shrink(x, A, W, seed, settings, plan.splits, O)
            sums = partial, partial.shape[2], R
            ready = operands._replace(x=x, B=B, base=base)
            expand(ready, settings, y, u, g, sums, parts, plan, inplace)
    return y, u, g


def shrink(
    x: Tensor,
    A: Tensor,
    W: Tensor | None,
    seed: Tensor | None,
    settings: Settings,
    splits: int,
    out_features: int,
    own: tuple[int, ...] = (),
) -> tuple[Tensor, int]:
    """The first of two launches: sums over parts of K (parts, M, columns), those of A, then those of W; and how many parts.

    Args:
        own: the first columns of mixtures side by side that have masks of their own, and where the last one's end; seed has one
            for each of them.
    """
    mixture, dropout_p, _ = settings
    (M, K), R, N = x.shape, mixture.total_rank, mixture.num_experts
    firsts = own or (0, R)
    widest = max(end - first for first, end in pairwise(firsts))
    most, size = triton.next_power_of_2(M), blocks(M, widest, N, x.element_size())
    threshold, drops = dropout(x, dropout_p)
    parts, per_split = split_evenly(K, size.k, splits)
    width = R + (N if W is not None else 0)
    partial = x.new_empty(parts, M, width, dtype=torch.float32)
    of_columns = blocks_of_columns(firsts, size.r)
    A_blocks, W_blocks = of_columns["BLOCKS"][-1], divide_up(N, size.r) if W is not None else 0
    constants = {**static(x, mixture), **drops}
    constants |= dict(WIDTH=width, A_BLOCKS=A_blocks, **of_columns, BLOCK_R=size.r, BLOCK_K=size.k)

    def grid(sizes: dict[str, int]) -> tuple[int, ...]:
        return A_blocks + W_blocks, divide_up(M, sizes["BLOCK_M"]), parts

    arguments = (x, A, A if W is None else W, partial, seed, threshold, M, K, x.stride(0), per_split)
    shape_class = (x.dtype, K, out_features, most, parts)
    options = tune.of_forward(most, x.element_size(), size.r, without="BLOCK_O")
    tune.launch(forward_kernels, "shrink", grid, arguments, constants, shape_class, options, partial)
    return partial, parts


def expand(
    operands: ForwardOperands,
    settings: Settings,
    y: Tensor,
    u: Tensor,
    g: Tensor,
    sums: tuple[Tensor, int, int],
    parts: int,
    plan: Plan,
    inplace: bool,
) -> None:
    """The second launch: writes y, u and, with a router, g.

    Args:
        operands: B and base as kernels take them. sums: those of `shrink`, from the experts' first column on, the columns of a row,
            and where the router's begin.
        plan: how many parts of O there are.
    """
    x, _, B, router_weight, router_bias, _, base, _ = operands
    mixture, dropout_p, dense = settings
    (M, K), O, R = x.shape, B.shape[0], mixture.total_rank
    most = triton.next_power_of_2(M)
    # as many parts of O as plan_forward has, whose tiles of y are 128 bytes wide
    parts_of_O = 1 if plan.fused else divide_up(divide_up(O, 128 // x.element_size()), plan.out_tiles)
    held = columns_of_expand(R, x.element_size())
    partial, width, router = sums
    constants = {
        **static(x, mixture),
        **columns(mixture, dropout_p),
        **dict(ROUTED=router_weight is not None, HAS_BIAS=router_bias is not None, HAS_BASE=base is not None),
        **dict(INPLACE=inplace, DENSE=dense, WIDTH=width, ROUTER=router, BLOCK_R=held),
    }

    def run(to: Tensor, BLOCK_M: int, BLOCK_O: int, **chosen: int) -> None:
        splits, columns_per_split = split_evenly(O, BLOCK_O, parts_of_O)
        source = to if inplace else base
        ld_base = 0 if source is None else source.stride(0)
        forward_kernels.expand[(divide_up(M, BLOCK_M), splits)](
            *(partial, B, router_bias, g, source, to, u, M, O, parts, columns_per_split),
            *(ld_base, to.stride(0)),
            **constants,
            **dict(BLOCK_M=BLOCK_M, BLOCK_O=BLOCK_O),
            **chosen,
        )

    options = tune.of_forward(most, x.element_size(), held, divide_up(R, held))
    parts_class = (x.dtype, K, O, most, parts)
    tune.tuned("expand", constants, parts_class, options, run, y, scratch=inplace)
