"""Host side of the Triton kernels: blocks from shapes, memory, launches. Nothing here waits for the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from rode_kernels.gpu import tf32_allowed, with_neighbouring_columns
from rode_kernels.mixture import Mixture
from rode_kernels.plan import plan_forward
from rode_kernels.triton import backward_kernels, forward_kernels, interpreted
from rode_kernels.triton.tune import of_backward, of_forward, tuned

INTERPRETED_MULTIPROCESSORS = 2  # as few as let small problems fill the device
ADD_BLOCK = 1024


@dataclass(frozen=True)
class Blocks:
    """Sizes that decide the bits: fixed for a shape class, never tuned.

    Attributes:
        k: of K, in the sums of forward and the columns of x in backward. r: of packed columns, all of them where R <= 64.
        n: of experts. o: columns of y whose t one program of `through_y` computes. tokens: of backward's sums over tokens.
    """

    k: int
    r: int
    n: int
    o: int
    tokens: int


def blocks(total_rank: int, experts: int, element_size: int) -> Blocks:
    """What fits the registers. float32 products without tf32 run on no matrix unit, and hold a whole K of their operands."""
    wide = element_size == 4
    r = min(32 if wide else 64, max(16, triton.next_power_of_2(total_rank)))
    n = max(16, triton.next_power_of_2(experts))
    if wide:
        return Blocks(k=16, r=r, n=n, o=64, tokens=16)
    if r == 64:
        return Blocks(k=64, r=r, n=n, o=64, tokens=32)
    return Blocks(
        k=64, r=r, n=n, o=64 if amd() else min(256, 8192 // r), tokens=32 if amd() else 64
    )  # AMD: fewer registers for each warp


def amd() -> bool:
    return torch.version.hip is not None


def _multiprocessors(x: Tensor) -> int:
    if x.device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def _static(x: Tensor, mixture: Mixture) -> dict:
    """Constants of every kernel."""
    return dict(
        N=mixture.num_experts,
        R=mixture.total_rank,
        PRECISION="tf32" if x.dtype == torch.float32 and tf32_allowed() else "ieee",
        INTERPRETED=interpreted(),
    )


def _columns(mixture: Mixture, dropout_p: float) -> dict:
    return dict(OFFSETS=mixture.offsets, SCALING=mixture.scaling_with_dropout(dropout_p))


def _dropout(x: Tensor, dropout_p: float) -> tuple[int, dict]:
    return int(dropout_p * 2.0**32), dict(DROPOUT=dropout_p > 0.0, ALIGNED=x.shape[1] % 4 == 0)


def _like(x: Tensor, *weights: Tensor | None) -> list[Tensor | None]:
    """Parameters in x's dtype, contiguous."""
    return [None if w is None else w.to(x.dtype).contiguous() for w in weights]


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    gates: Tensor | None,
    base: Tensor | None,
    seed: Tensor | None,
    mixture: Mixture,
    dropout_p: float,
    dense: bool,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.forward`; tiles of tokens with nothing open are skipped."""
    (M, K), O, R, N = x.shape, B.shape[0], mixture.total_rank, mixture.num_experts
    x, into = with_neighbouring_columns(x), base if inplace else None
    base = None if base is None else with_neighbouring_columns(base)
    y = base if inplace else x.new_empty(M, O)
    u = x.new_empty(M, R, dtype=torch.float32)
    routed = router_weight is not None
    g = x.new_empty(M, N, dtype=torch.float32) if routed else gates.contiguous()
    if M > 0:
        A, W, B = _like(x, A, router_weight, B)
        bias = None if router_bias is None else router_bias.float().contiguous()
        # parts of K decide the bits: for the shape class, not for the very number of tokens
        plan = plan_forward(
            triton.next_power_of_2(M), K, O, R, N if routed else 0, x.element_size(), _multiprocessors(x)
        )
        size, static = blocks(R, N, x.element_size()), _static(x, mixture)
        threshold, dropout = _dropout(x, dropout_p)
        ends = dict(
            **_columns(mixture, dropout_p),
            ROUTED=routed,
            HAS_BIAS=bias is not None,
            HAS_BASE=base is not None,
            INPLACE=inplace,
            DENSE=dense,
        )
        strides = (base.stride(0) if base is not None else 0, y.stride(0))
        shape_class = (x.dtype, K, O, mixture.ranks, routed, inplace)
        options = of_forward(triton.next_power_of_2(M), x.element_size(), R)
        if plan.fused and size.r >= R:

            def run(to: Tensor, BLOCK_M: int, BLOCK_O: int, **chosen) -> None:
                forward_kernels.fused[(_divide_up(M, BLOCK_M),)](
                    *(
                        x,
                        A,
                        W,
                        B,
                        bias,
                        g,
                        to if inplace else base,
                        to,
                        u,
                        seed,
                        threshold,
                        M,
                        K,
                        O,
                        x.stride(0),
                        *strides,
                    ),
                    **{**static, **ends, **dropout, **chosen},
                    **dict(BLOCK_M=BLOCK_M, BLOCK_N=size.n, BLOCK_R=size.r, BLOCK_K=size.k, BLOCK_O=BLOCK_O),
                )

            tuned("fused", shape_class, M, options, run, y, scratch=inplace)
        else:
            share = _divide_up(_divide_up(K, size.k), plan.splits) * size.k
            parts, width = _divide_up(K, share), R + (N if routed else 0)
            partial = x.new_empty(parts, M, width, dtype=torch.float32)
            # as many as plan_forward has, whose tiles of y are 128 bytes wide
            parts_of_O = (
                1 if plan.fused else _divide_up(_divide_up(O, 128 // x.element_size()), plan.out_tiles)
            )
            A_blocks, W_blocks = _divide_up(R, size.r), _divide_up(N, size.r) if routed else 0

            def first(_: Tensor, BLOCK_M: int, BLOCK_O: int, **chosen) -> None:
                forward_kernels.shrink[(A_blocks + W_blocks, _divide_up(M, BLOCK_M), parts)](
                    *(x, A, A if W is None else W, partial, seed, threshold, M, K, x.stride(0), share),
                    **{**static, **dropout, **chosen},
                    **dict(WIDTH=width, A_BLOCKS=A_blocks, BLOCK_M=BLOCK_M, BLOCK_R=size.r, BLOCK_K=size.k),
                )

            def second(to: Tensor, BLOCK_M: int, BLOCK_O: int, **chosen) -> None:
                out_share = _divide_up(_divide_up(O, parts_of_O), BLOCK_O) * BLOCK_O
                forward_kernels.expand[(_divide_up(M, BLOCK_M), _divide_up(O, out_share))](
                    *(partial, B, bias, g, to if inplace else base, to, u, M, O, parts, out_share, *strides),
                    **{**static, **ends, **chosen},
                    **dict(WIDTH=width, BLOCK_M=BLOCK_M, BLOCK_R=size.r, BLOCK_O=BLOCK_O),
                )

            tuned("shrink", shape_class, M, options, first, y)
            tuned("expand", shape_class, M, options, second, y, scratch=inplace)
    if into is not None and into is not base:  # its columns were not neighbours
        into.copy_(y)
        y = into
    return y, u, g


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
    A, W, B = _like(x, A, router_weight, B)
    size, static, columns = (
        blocks(R, N, x.element_size()),
        _static(x, mixture),
        _columns(mixture, dropout_p),
    )
    threshold, dropout = _dropout(x, dropout_p)
    routed, multiprocessors = W is not None, _multiprocessors(x)
    shape_class = (x.dtype, K, O, mixture.ranks, routed, needs, dense)
    R_blocks, o_blocks, k_blocks = _divide_up(R, size.r), _divide_up(O, size.o), _divide_up(K, size.o)

    # What ranges of tokens add up to: dB, dA, dWr, dbr, each from a multiple of ADD_BLOCK on.
    segments, at = [], 0
    for wanted, count in ((need_B, O * R), (need_A, R * K), (need_router, N * K), (need_bias, N)):
        segments.append(at)
        at += _divide_up(count, ADD_BLOCK) * ADD_BLOCK if wanted else 0
    _, at_A, at_W, at_b = segments
    need_weights = need_A or need_router or need_bias
    share = (
        _divide_up(
            _divide_up(M, size.tokens),
            max(1, _divide_up(multiprocessors, max(o_blocks, k_blocks) * R_blocks)),
        )
        * size.tokens
    )
    count = _divide_up(M, share)
    ranges = x.new_empty(count, at, dtype=torch.float32)

    need_v = need_x or need_weights or need_gates
    t = x.new_empty(o_blocks, M, R, dtype=torch.float32) if dy is not None and need_v else None
    if dy is not None and (need_v or need_B):

        def through_y(_: Tensor, **chosen) -> None:
            backward_kernels.through_y[(o_blocks, R_blocks, count)](
                *(dy, B, u, g, t, ranges, M, O, dy.stride(0), dy.stride(1), share, at),
                **{**static, **columns, **chosen},
                **dict(
                    NEED_T=t is not None,
                    NEED_B=need_B,
                    DENSE=dense,
                    BLOCK_M=size.tokens,
                    BLOCK_R=size.r,
                    BLOCK_O=size.o,
                ),
            )

        tuned("through_y", shape_class, M, of_backward(num_warps=8, num_stages=2), through_y, x)
    elif need_B:
        ranges[:, : O * R] = 0.0
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    dh = None
    if need_v:
        du, dh = x.new_empty(M, R), x.new_empty(M, N, dtype=torch.float32)
        rows = 16 if M <= 16 or size.r < R else 32 if x.element_size() == 4 else 64
        parts = min(_divide_up(K, size.k), max(1, multiprocessors // _divide_up(M, rows))) if need_x else 1
        part = _divide_up(_divide_up(K, size.k), parts) * size.k

        def through_v(_: Tensor, **chosen) -> None:
            backward_kernels.through_v[(_divide_up(M, rows), _divide_up(K, part) if need_x else 1)](
                *(
                    t,
                    u,
                    g,
                    None if dgates is None else dgates.contiguous(),
                    A,
                    W,
                    dx,
                    du,
                    dh,
                    seed,
                    threshold,
                    M,
                    K,
                    o_blocks,
                    part,
                ),
                **{**static, **columns, **dropout, **chosen},
                **dict(
                    ROUTED=routed,
                    HAS_DY=dy is not None,
                    HAS_DGATES=dgates is not None,
                    NEED_X=need_x,
                    DENSE=dense,
                ),
                **dict(BLOCK_M=rows, BLOCK_N=size.n, BLOCK_R=size.r, BLOCK_K=size.k),
            )

        tuned(
            "through_v",
            shape_class,
            M,
            of_backward(num_warps=8 if amd() or x.element_size() == 4 else 4, num_stages=2),
            through_v,
            x,
        )
    if need_weights:
        router_blocks = _divide_up(N, size.r) if need_router or need_bias else 0
        A_blocks = R_blocks if need_A else 0

        def weights(_: Tensor, **chosen) -> None:
            backward_kernels.weights[(k_blocks, A_blocks + router_blocks, count)](
                *(x, du, dh, ranges, seed, threshold, M, K, x.stride(0), share, at, at_A, at_W, at_b),
                **{**static, **dropout, **chosen},
                **dict(NEED_A=need_A, NEED_W=need_router, NEED_b=need_bias, A_BLOCKS=A_blocks),
                **dict(BLOCK_M=size.tokens, BLOCK_R=size.r, BLOCK_K=size.o),
            )

        tuned("weights", shape_class, M, of_backward(num_warps=8, num_stages=2), weights, x)

    def summed(wanted: bool, dtype: torch.dtype | None, first: int, end: int) -> Tensor | None:
        return x.new_empty(end - first, dtype=dtype) if wanted else None

    sums = [
        summed(need_B, dtypes[1], 0, at_A),
        summed(need_A, dtypes[0], at_A, at_W),
        summed(need_router, dtypes[2], at_W, at_b),
        summed(need_bias, torch.float32, at_b, at),
    ]
    if at > 0:
        # a gradient that nobody asks for has no program, but its pointer must have a type
        targets = [ranges if sums[i] is None else sums[i] for i in (1, 0, 2, 3)]
        backward_kernels.add[(at // ADD_BLOCK,)](
            *(ranges, *targets, count, at, at_A, at_W, at_b), BLOCK=ADD_BLOCK
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
