"""Mixtures that read the same x on the GEMM path: the products with x once for all of them, the others for each.

Forward: sums = x [A; Wr]^T of all, then for each the gate kernel and base + v B^T. Backward: for each t = dy B, the gate kernel and
dB = dy^T v, then [dA; dWr] = D^T x and dx = D [A; Wr] of all. With dropout only the routers' products are those of all: the experts
of each mixture read its own copy of x (all are made from one reading), and its own mask goes through its part of dx. See
`rode_kernels.backends.gpu.gemm_path`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


class SiblingDropout(NamedTuple):
    """Dropout of all mixtures.

    Attributes:
        copies: makes a copy of x for each mask. alone: goes through one mixture's part of dx. seeds: of the masks, side by side.
    """

    copies: Dropout
    alone: DropKernel
    seeds: Tensor

    def mask(self, j: int) -> int:
        """The mask of mixture `j`: its own, or the only one."""
        return j if self.copies.masks > 1 else 0


def _sums(
    x: Tensor, Ws: Sequence[Tensor], Rs: Sequence[int], dropout: SiblingDropout | None, stream: int
) -> list[Tensor]:
    """x W^T of each."""
    if dropout is None:
        apart = product(x, torch.cat(list(Ws)).t()).split([W.shape[0] for W in Ws], 1)
        return [sums.contiguous() for sums in apart]
    routers = [W[R:] for W, R in zip(Ws, Rs, strict=True)]  # which see all of x
    apart, found = product(x, torch.cat(routers).t()).split([W.shape[0] for W in routers], 1), []
    for W, R, of_router in zip(Ws, Rs, apart, strict=True):
        sums = x.new_empty(x.shape[0], W.shape[0], dtype=torch.float32)
        sums[:, R:] = of_router
        found.append(sums)
    for tokens, copies in dropout.copies.parts(x, dropout.seeds, stream):
        for j, (W, R) in enumerate(zip(Ws, Rs, strict=True)):
            found[j][tokens, :R] = product(copies[dropout.mask(j)], W[:R].t())
    return found


def forward(
    gate_kernels: Sequence[GateKernel],
    dropout: SiblingDropout | None,
    layouts: Sequence[Layout],
    operands: Sequence[ForwardOperands],
    ys: Sequence[Tensor],
    stream: int,
) -> list[Outputs]:
    """Writes each y; gives it with u and g."""
    x, floats, outputs = operands[0].x, torch.float32, []
    packed = [kernel.parameters(o, stream) for kernel, o in zip(gate_kernels, operands, strict=True)]
    Rs = [layout.shape.total_rank for layout in layouts]
    all_sums = _sums(x, [W for W, _ in packed], Rs, dropout, stream)
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
    dropout: SiblingDropout | None,
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
    Rs = [layout.shape.total_rank for layout in layouts]
    if sums_x:
        all_sums = _weight_sums(x, Ds, Rs, needs, dropout, stream)
        for j, (o, need, layout) in enumerate(zip(operands, needs, layouts, strict=True)):
            (of_experts, of_router), N = all_sums[j], layout.shape.experts
            dA = of_experts.to(o.A.dtype) if need[1] and of_experts is not None else None
            dW = None
            if need[3] and o.router_weight is not None:
                dW = of_router[:N].to(o.router_weight.dtype)
            found[j] = found[j]._replace(A=dA, router_weight=dW)
    dx = _input_gradient(x, Ds, Ws, Rs, dropout, stream) if need_x else None
    return [grads._replace(x=None if j else dx) for j, grads in enumerate(found)]


def _weight_sums(
    x: Tensor,
    Ds: Sequence[Tensor],
    Rs: Sequence[int],
    needs: Sequence[Needs],
    dropout: SiblingDropout | None,
    stream: int,
) -> list[tuple[Tensor | None, Tensor]]:
    """Sums of each: dA, with dropout None where nobody asks for it, and the router's gradient with zeros below."""
    if dropout is None:
        apart = product(torch.cat(list(Ds), 1).t(), x).split([D.shape[1] for D in Ds])
        return [(sums[:R], sums[R:]) for sums, R in zip(apart, Rs, strict=True)]
    of_routers = [D[:, R:] for D, R in zip(Ds, Rs, strict=True)]
    apart = product(torch.cat(of_routers, 1).t(), x).split([D.shape[1] for D in of_routers])
    wanted = [j for j, need in enumerate(needs) if need[1]]
    of_experts = {j: x.new_zeros(Rs[j], x.shape[1], dtype=torch.float32) for j in wanted}
    if wanted:
        for tokens, copies in dropout.copies.parts(x, dropout.seeds, stream):
            for j, sums in of_experts.items():
                sums += product(Ds[j][tokens, : Rs[j]].t(), copies[dropout.mask(j)])
    return [(of_experts.get(j), of_router) for j, of_router in enumerate(apart)]


def _input_gradient(
    x: Tensor,
    Ds: Sequence[Tensor],
    Ws: Sequence[Tensor],
    Rs: Sequence[int],
    dropout: SiblingDropout | None,
    stream: int,
) -> Tensor:
    """dx: the sum of all."""
    if dropout is None:
        return rounded_product(torch.cat(list(Ds), 1), torch.cat(list(Ws)))
    dx = x.new_empty(x.shape)
    for tokens in parts_of(x):
        for j, (D, W, R) in enumerate(zip(Ds, Ws, Rs, strict=True)):
            of_one, mask = rounded_product(D[tokens, :R], W[:R]), dropout.mask(j)
            seed = dropout.seeds[mask : mask + 1]
            dropout.alone(of_one, of_one if j else dx[tokens], seed, tokens.start, stream)
            if j:
                dx[tokens] += of_one
    routers = [(D[:, R:], W[R:]) for D, W, R in zip(Ds, Ws, Rs, strict=True)]
    return add_to_gradient(dx, torch.cat([D for D, _ in routers], 1), torch.cat([W for _, W in routers]))
