"""Host side of mixtures that read the same x: the launches over x once for all of them, the others for each.

Forward: `shrink` of all, `expand` of each. Backward: `grad_output_pass` and `gate_backward` of each, `grad_input_pass` of all,
`reduce_partials` of each and one for dA and dWr of all. Columns stand as `rode_kernels.backends.gpu.siblings` says, without gaps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from rode_kernels.backends.gpu.layout import with_neighbouring_columns
from rode_kernels.backends.gpu.planner import plan_forward
from rode_kernels.backends.gpu.plans import ProblemShape
from rode_kernels.backends.gpu.siblings import Columns, count_masks, seeds_of
from rode_kernels.backends.triton import device
from rode_kernels.backends.triton.launch_backward import (
    InputSums,
    OutputSums,
    gate_backward,
    grad_input,
    grad_output,
    reduce,
    result,
)
from rode_kernels.backends.triton.launch_forward import expand, shrink
from rode_kernels.backends.triton.tiles import like
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs


def _side_by_side(operands: Sequence[AnyOperands]) -> tuple[Tensor, Tensor]:
    """All A, and all routers, in x's dtype."""
    x = operands[0].x
    routers = [o.router_weight.to(x.dtype) for o in operands if o.router_weight is not None]
    return torch.cat([o.A.to(x.dtype) for o in operands]), torch.cat(routers)


def _own_masks(
    operands: Sequence[AnyOperands], settings: Sequence[Settings], columns: Columns
) -> tuple[Tensor | None, tuple[int, ...]]:
    """The seeds, and the columns of mixtures that have masks of their own, as `shrink` takes them."""
    masks = count_masks(operands, settings)
    return seeds_of(operands, masks), (*columns.experts, columns.total_rank) if masks > 1 else ()


def forward(operands: Sequence[ForwardOperands], settings: Sequence[Settings]) -> list[Outputs]:
    """The forward passes, in place where there is a base."""
    x = with_neighbouring_columns(operands[0].x)
    M, K = x.shape
    columns = Columns.of([s.mixture for s in settings], 1)
    together = columns.settings(settings[0].dropout_p)
    A, W = _side_by_side(operands)
    most = triton.next_power_of_2(M)

    def shape(O: int, total_rank: int, experts: int) -> ProblemShape:
        return ProblemShape(most, K, O, total_rank, experts, x.element_size())

    widest = max(o.B.shape[0] for o in operands)
    plan = plan_forward(shape(widest, columns.total_rank, columns.total_experts), device.multiprocessors(x))
    seeds, own = _own_masks(operands, settings, columns)
    splits = 1 if plan.fused else plan.splits
    partial, parts = shrink(x, A, W, seeds, together, splits, widest, own)
    outputs = []
    for j, (o, s) in enumerate(zip(operands, settings, strict=True)):
        base, B, mixture = with_neighbouring_columns(o.base), like(x, o.B), s.mixture
        O, R, N = B.shape[0], mixture.total_rank, mixture.num_experts
        y = x.new_empty(M, O) if base is None else base
        u, g = (x.new_empty(M, n, dtype=torch.float32) for n in (R, N))
        alone = plan_forward(shape(O, R, N), device.multiprocessors(x))
        first = columns.experts[j]
        sums = partial.view(-1)[first:], columns.total, columns.routers[j] - first
        expand(o._replace(x=x, B=B, base=base), s, y, u, g, sums, parts, alone, base is not None)
        outputs.append((y, u, g))
    return outputs


def backward(
    operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
) -> list[Gradients]:
    """The backward passes; the first one has the sum of the gradients of x."""
    x = with_neighbouring_columns(operands[0].x)
    M, K = x.shape
    columns = Columns.of([s.mixture for s in settings], 1)
    together = columns.settings(settings[0].dropout_p)
    R, N = columns.total_rank, columns.total_experts
    need_x, need_A, need_router = needs[0][0], any(n[1] for n in needs), any(n[3] for n in needs)
    need_v = need_x or need_A or need_router or any(n[4] for n in needs)
    du, dh = x.new_empty(M, R), x.new_empty(M, N, dtype=torch.float32)
    grads = []
    for j, (o, s, need) in enumerate(zip(operands, settings, needs, strict=True)):
        o = o._replace(x=x)
        has_dy = o.dy is not None
        of_y = grad_output(o, s, has_dy and need_v, has_dy and need[2])
        dbias = None
        if need_v:
            of_router = columns.routers[j] - R
            dbias = gate_backward(o, s, of_y, du[:, columns.experts[j] :], dh[:, of_router:], need[4])
        experts = s.mixture.num_experts
        dB = result(x, need[2], has_dy, o.B.dtype, *o.B.shape)
        drouter_bias = result(x, need[4], True, torch.float32, experts)
        reduce(x, experts, of_y, InputSums(None, of_y.dB, 1, 0, 0), dbias, (dB, None, None, drouter_bias))
        grads.append(Gradients(None, None, dB, None, drouter_bias, None))
    if not (need_x or need_A or need_router):
        return grads
    has_dy, widest = any(o.dy is not None for o in operands), max(o.B.shape[0] for o in operands)
    A, W = _side_by_side(operands)
    wanted, (seeds, own) = (need_x, need_A, need_router), _own_masks(operands, settings, columns)
    of_x = grad_input(x, du, dh, A, W, seeds, together, wanted, (has_dy, widest), own)
    dA = result(x, need_A, True, torch.float32, R, K)
    drouter = result(x, need_router, True, torch.float32, N, K)
    reduce(x, N, OutputSums(None, 1, of_x.weights, 1, 0), of_x, None, (None, dA, drouter, None))
    found = []
    for j, (o, need, grad) in enumerate(zip(operands, needs, grads, strict=True)):
        of_A, of_router = columns.experts[j], columns.routers[j] - R
        mine_A = mine_router = None
        if dA is not None and need[1]:
            mine_A = dA[of_A : of_A + o.A.shape[0]].to(o.A.dtype)
        if drouter is not None and need[3] and o.router_weight is not None:
            mine_router = drouter[of_router : of_router + o.g.shape[1]].to(o.router_weight.dtype)
        found.append(grad._replace(A=mine_A, router_weight=mine_router, x=None if j else of_x.dx))
    return found
