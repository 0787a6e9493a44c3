"""Routers: how they start, and the gates that are computed outside the fused operation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@torch.no_grad()
def init_router_(weight: Tensor, bias: Tensor | None, how: str) -> None:
    """Fills a router (N, K) and its bias (N,) in place; `how` is one of `config.ROUTER_INITS`."""
    if how == "open":
        weight.zero_()
        bias.fill_(1.0)
        return
    if how == "normal":
        nn.init.normal_(weight, std=0.02)
        if bias is not None:
            bias.zero_()
        return
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # both as nn.Linear.reset_parameters
    if bias is not None:
        bound = 1.0 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -bound, bound)


class _Logits(torch.autograd.Function):
    """F.linear in float32 that keeps x as it came for backward, and no wider copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = dh.flatten(0, -2)  # (M, N)
        with torch.autocast(x.device.type, enabled=False):
            dx = (dh @ weight.to(dh.dtype)).to(x.dtype) if need_x else None
            dweight = rows.T @ x.flatten(0, -2).to(dh.dtype) if need_weight else None
        return (
            dx,
            None if dweight is None else dweight.to(weight.dtype),
            rows.sum(0).to(ctx.bias_dtype) if need_bias else None,
        )


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wr^T + br`, x (..., K) to (..., N), in float32 (float64 for float64 x) under autocast too: rounded logits flip choices."""
    return _Logits.apply(x, weight, bias)


def softmax_gates(logits: Tensor) -> Tensor:
    """Dense gates that sum to 1 (the paper's Eq. 1, FoodLMM+MoE): (..., N) to (..., N)."""
    return logits.softmax(-1)


def top1_gates(logits: Tensor) -> Tensor:
    """The largest softmax value for its expert, exact zeros for the rest, so that they are skipped: (..., N) to (..., N).

    Ties go to the first expert. The choice has no gradient; the kept value's reaches every logit through the softmax.
    """
    gates = logits.softmax(-1)
    best, index = gates.max(-1, keepdim=True)
    return torch.zeros_like(gates).scatter(-1, index, best)


COMPUTED_GATES = {"softmax": softmax_gates, "top1": top1_gates}
