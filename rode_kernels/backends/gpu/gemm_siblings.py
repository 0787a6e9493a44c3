"""Mixtures that read the same x on the GEMM path: the products with x once for all of them, the others for each.

Forward: sums = x [A; Wr]^T of all, then for each the gate kernel and base + v B^T. Backward: for each t = dy B, the gate kernel and
dB = dy^T v, then [dA; dWr] = D^T x and dx = D [A; Wr] of all. See `rode_kernels.backends.gpu.gemm_path`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rode_kernels.backends.gpu.gemm_path import (
    GateGradients,
    GateKernel,
    GateTensors,
    add_product,
    product,
    widths,
)
from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients
from rode_kernels.passes import Needs, Outputs


def forward(
    gate_kernels: Sequence[GateKernel],
    layouts: Sequence[Layout],
    operands: Sequence[ForwardOperands],
    ys: Sequence[Tensor],
    stream: int,
) -> list[Outputs]:
    """Writes each y; gives it with u and g."""
    x, floats, outputs = operands[0].x, torch.float32, []
    packed = [kernel.parameters(o, stream) for kernel, o in zip(gate_kernels, operands, strict=True)]
    sums = product(x, torch.cat([W for W, _ in packed]).t())
    apart = sums.split([W.shape[0] for W, _ in packed], 1)
    for j, (o, y, layout, kernel) in enumerate(zip(operands, ys, layouts, gate_kernels, strict=True)):
        (M, R), N, empty = (x.shape[0], layout.shape.total_rank), layout.shape.experts, kernel.empty
        u, g = empty(M, R, like=x, dtype=floats), empty(M, N, like=x, dtype=floats)
        v = empty(M, widths(layout)[1], like=x)
        kernel.forward(GateTensors(apart[j].contiguous(), o.router_bias, None, u, g, v), stream)
        add_product(y, o.base, v, packed[j][1])
        outputs.append((y, u, g))
    return outputs


def backward(
    gate_kernels: Sequence[GateKernel],
    layouts: Sequence[Layout],
    operands: Sequence[BackwardOperands],
    needs: Sequence[Needs],
    stream: int,
) -> list[Gradients]:
    """The gradients, each in its parameter's dtype; x's stands in the first ones."""
    x, M = operands[0].x, operands[0].x.shape[0]
    need_x, sums_x = needs[0][0], any(n[1] or n[3] for n in needs)
    Ws, Ds, found = [], [], []
    for o, need, layout, kernel in zip(operands, needs, layouts, gate_kernels, strict=True):
        shape, (columns, pitch), empty = layout.shape, widths(layout), kernel.empty
        W, B = kernel.parameters(o, stream)
        dy, dB = o.dy, None
        if dy is not None and not (dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1]):
            dy = dy.contiguous()
        t = None if dy is None else product(dy, B)
        v = empty(M, pitch, like=x) if need[2] and dy is not None else None
        D = empty(M, columns, like=x) if need_x or sums_x else None
        dh = empty(M, shape.experts, like=o.g)
        kernel.backward(GateGradients(t, o.u, o.g, o.dgates, v, D, dh), stream)
        if dy is not None and v is not None:
            dB = product(dy.t(), v)[:, : shape.total_rank].to(o.B.dtype).contiguous()
        elif need[2]:
            dB = torch.zeros_like(o.B)
        Ws.append(W)
        if D is not None:
            Ds.append(D)
        found.append(Gradients(None, None, dB, None, dh.sum(0) if need[4] else None, None))
    if not Ds:
        return found
    all_D, dx = torch.cat(Ds, 1), None
    if sums_x:
        apart = product(all_D.t(), x).split([D.shape[1] for D in Ds])
        for j, (o, need, layout) in enumerate(zip(operands, needs, layouts, strict=True)):
            R, N = layout.shape.total_rank, layout.shape.experts
            dA = apart[j][:R].to(o.A.dtype) if need[1] else None
            dW = None
            if need[3] and o.router_weight is not None:
                dW = apart[j][R : R + N].to(o.router_weight.dtype)
            found[j] = found[j]._replace(A=dA, router_weight=dW)
    if need_x:
        W = torch.cat(Ws)
        dx = torch.mm(all_D, W) if x.is_cuda else product(all_D, W).to(x.dtype)
    return [grads._replace(x=None if j else dx) for j, grads in enumerate(found)]
