"""Mixtures that read the same x on the GEMM path: the products with x once for all of them, the others for each.

Forward: sums = x [A; Wr]^T of all, then for each the gate kernel and base + v B^T. Backward: for each t = dy B, the gate kernel and
dB = dy^T v, then [dA; dWr] = D^T x and dx = D [A; Wr] of all. With dropout only the routers' products are those of all: the experts
of each mixture read its own copy of x, and its own mask goes through its part of dx. See `rode_kernels.backends.gpu.gemm_path`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rode_kernels.backends.gpu.gemm_path import (
    DropKernel,
    Dropout,
    GateGradients,
    GateKernel,
    GateTensors,
    add_product,
    add_to_gradient,
    parts_of,
    product,
    rounded_product,
    widths,
)
from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients
from rode_kernels.passes import Needs, Outputs


def _dropouts(
    drop_kernels: Sequence[DropKernel | None],
    gate_kernels: Sequence[GateKernel],
    seeds: Sequence[Tensor | None],
) -> list[tuple[Dropout, Tensor]]:
    """Dropout and its seed of each; empty without."""
    found = []
    for drop_kernel, gate_kernel, seed in zip(drop_kernels, gate_kernels, seeds, strict=True):
        if drop_kernel is not None and seed is not None:
            found.append((Dropout(drop_kernel, gate_kernel), seed))
    return found


def _sums(
    x: Tensor,
    Ws: Sequence[Tensor],
    layouts: Sequence[Layout],
    dropouts: Sequence[tuple[Dropout, Tensor]],
    stream: int,
) -> list[Tensor]:
    """x W^T of each."""
    if not dropouts:
        apart = product(x, torch.cat(list(Ws)).t()).split([W.shape[0] for W in Ws], 1)
        return [sums.contiguous() for sums in apart]
    Rs = [layout.shape.total_rank for layout in layouts]
    routers = [W[R:] for W, R in zip(Ws, Rs, strict=True)]  # which see all of x
    apart, found = product(x, torch.cat(routers).t()).split([W.shape[0] for W in routers], 1), []
    for W, R, of_router, (dropout, seed) in zip(Ws, Rs, apart, dropouts, strict=True):
        sums = x.new_empty(x.shape[0], W.shape[0], dtype=torch.float32)
        sums[:, R:] = of_router
        for tokens, copy in dropout.parts(x, seed, stream):
            sums[tokens, :R] = product(copy, W[:R].t())
        found.append(sums)
    return found


def forward(
    gate_kernels: Sequence[GateKernel],
    drop_kernels: Sequence[DropKernel | None],
    layouts: Sequence[Layout],
    operands: Sequence[ForwardOperands],
    ys: Sequence[Tensor],
    stream: int,
) -> list[Outputs]:
    """Writes each y; gives it with u and g."""
    x, floats, outputs = operands[0].x, torch.float32, []
    packed = [kernel.parameters(o, stream) for kernel, o in zip(gate_kernels, operands, strict=True)]
    dropouts = _dropouts(drop_kernels, gate_kernels, [o.seed for o in operands])
    all_sums = _sums(x, [W for W, _ in packed], layouts, dropouts, stream)
    for j, (o, y, layout, kernel) in enumerate(zip(operands, ys, layouts, gate_kernels, strict=True)):
        (M, R), N, empty = (x.shape[0], layout.shape.total_rank), layout.shape.experts, kernel.empty
        u, g = empty(M, R, like=x, dtype=floats), empty(M, N, like=x, dtype=floats)
        v = empty(M, widths(layout)[1], like=x)
        kernel.forward(GateTensors(all_sums[j], o.router_bias, None, u, g, v), stream)
        add_product(y, o.base, v, packed[j][1])
        outputs.append((y, u, g))
    return outputs


def backward(
    gate_kernels: Sequence[GateKernel],
    drop_kernels: Sequence[DropKernel | None],
    layouts: Sequence[Layout],
    operands: Sequence[BackwardOperands],
    needs: Sequence[Needs],
    stream: int,
) -> list[Gradients]:
    """The gradients, each in its parameter's dtype; x's stands in the first ones."""
    x, M = operands[0].x, operands[0].x.shape[0]
    need_x, sums_x = needs[0][0], any(n[1] or n[3] for n in needs)
    dropouts = _dropouts(drop_kernels, gate_kernels, [o.seed for o in operands])
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
    Rs = [layout.shape.total_rank for layout in layouts]
    if sums_x:
        all_sums = _weight_sums(x, Ds, Rs, needs, dropouts, stream)
        for j, (o, need, layout) in enumerate(zip(operands, needs, layouts, strict=True)):
            (of_experts, of_router), N = all_sums[j], layout.shape.experts
            dA = of_experts.to(o.A.dtype) if need[1] and of_experts is not None else None
            dW = None
            if need[3] and o.router_weight is not None:
                dW = of_router[:N].to(o.router_weight.dtype)
            found[j] = found[j]._replace(A=dA, router_weight=dW)
    dx = _input_gradient(x, Ds, Ws, Rs, dropouts, stream) if need_x else None
    return [grads._replace(x=None if j else dx) for j, grads in enumerate(found)]


def _weight_sums(
    x: Tensor,
    Ds: Sequence[Tensor],
    Rs: Sequence[int],
    needs: Sequence[Needs],
    dropouts: Sequence[tuple[Dropout, Tensor]],
    stream: int,
) -> list[tuple[Tensor | None, Tensor]]:
    """Sums of each: dA, with dropout None where nobody asks for it, and the router's gradient with zeros below."""
    if not dropouts:
        apart = product(torch.cat(list(Ds), 1).t(), x).split([D.shape[1] for D in Ds])
        return [(sums[:R], sums[R:]) for sums, R in zip(apart, Rs, strict=True)]
    of_routers = [D[:, R:] for D, R in zip(Ds, Rs, strict=True)]
    apart = product(torch.cat(of_routers, 1).t(), x).split([D.shape[1] for D in of_routers])
    found: list[tuple[Tensor | None, Tensor]] = []
    for D, R, need, of_router, (dropout, seed) in zip(Ds, Rs, needs, apart, dropouts, strict=True):
        sums = None
        if need[1]:
            sums = torch.zeros(R, x.shape[1], dtype=torch.float32, device=x.device)
            for tokens, copy in dropout.parts(x, seed, stream):
                sums += product(D[tokens, :R].t(), copy)
        found.append((sums, of_router))
    return found


def _input_gradient(
    x: Tensor,
    Ds: Sequence[Tensor],
    Ws: Sequence[Tensor],
    Rs: Sequence[int],
    dropouts: Sequence[tuple[Dropout, Tensor]],
    stream: int,
) -> Tensor:
    """dx: the sum of all."""
    if not dropouts:
        return rounded_product(torch.cat(list(Ds), 1), torch.cat(list(Ws)))
    dx = x.new_empty(x.shape)
    for tokens in parts_of(x):
        for j, (D, W, R, (dropout, seed)) in enumerate(zip(Ds, Ws, Rs, dropouts, strict=True)):
            of_one = rounded_product(D[tokens, :R], W[:R])
            dropout.kernel(of_one, of_one if j else dx[tokens], seed, tokens.start, stream)
            if j:
                dx[tokens] += of_one
    routers = [(D[:, R:], W[R:]) for D, W, R in zip(Ds, Ws, Rs, strict=True)]
    return add_to_gradient(dx, torch.cat([D for D, _ in routers], 1), torch.cat([W for _, W in routers]))
