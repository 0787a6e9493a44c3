"""Passes with matrix products by PyTorch, for mixtures of many columns. One kernel runs between the products.

The formulas are those of `rode_kernels.backends.reference`. Gates are selected and numbers rounded as in the kernels. Closed
experts are multiplied with zeros instead of being skipped. `rode_kernels.backends.gpu.planner.prefer_gemm` decides which calls
take this path.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients


def product(a: Tensor, b: Tensor) -> Tensor:
    """The float32 sums of a b."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # for the emulator


def _into(y: Tensor, base: Tensor | None, v: Tensor, B: Tensor) -> None:
    """y = base + v B^T, rounded once; y may be base."""
    if not y.is_cuda and y.dtype != torch.float32:
        sums = product(v, B.t())
        y.copy_(sums if base is None else sums + base)
    elif base is None:
        torch.mm(v, B.t(), out=y)
    else:
        torch.addmm(base, v, B.t(), out=y)


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])


def widths(layout: Layout) -> tuple[int, int]:
    """Columns of W's products and of D, and those of v and t: multiples of 8, which matrix products need to be fast."""
    R, N = layout.mixture.total_rank, layout.mixture.num_experts if layout.routed else 0
    return divide_up(R + N, 8) * 8, divide_up(R, 8) * 8


class GateKernel(Protocol):
    """The kernel between the products, on one backend, for one layout; (columns, pitch) are `widths`."""

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...

    def parameters(self, operands: AnyOperands, stream: int) -> tuple[Tensor, Tensor]:
        """In x's dtype: W (columns, K), which is A above the router's weights above zeros, and B (O, pitch), zeros at the end."""

    def forward(
        self,
        sums: Tensor,
        bias: Tensor | None,
        gates: Tensor | None,
        u: Tensor,
        g: Tensor,
        v: Tensor,
        stream: int,
    ) -> None:
        """From sums = x W^T (M, columns), float32, or given gates: u (M, R), g (M, N) if none are given, and v (M, pitch)."""

    def backward(
        self,
        t: Tensor | None,
        u: Tensor,
        g: Tensor,
        dgates: Tensor | None,
        v: Tensor | None,
        D: Tensor | None,
        dh: Tensor,
        stream: int,
    ) -> None:
        """From t = dy B (M, pitch), float32, or nothing: v again, D (M, columns), which is du, then the logits' gradients, then
        zeros, and dh (M, N), theirs in float32, or those of given gates. None means not wanted."""


class GemmForward:
    """The forward pass, called like `cuda.prepared.PreparedForward`."""

    def __init__(self, gate_kernel: GateKernel, layout: Layout):
        self.gate_kernel, self.tokens = gate_kernel, layout.tokens
        self.R, self.N = layout.mixture.total_rank, layout.mixture.num_experts
        _, self.pitch = widths(layout)

    def __call__(self, operands: ForwardOperands, y: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """Writes y; gives u and g."""
        x, _, _, _, router_bias, gates, base, _ = operands
        M, floats = self.tokens, torch.float32
        empty = self.gate_kernel.empty
        u = empty(M, self.R, like=x, dtype=floats)
        g = empty(M, self.N, like=x, dtype=floats) if gates is None else gates
        if M == 0:
            return u, g
        W, B = self.gate_kernel.parameters(operands, stream)
        sums = product(_rows(x), W.t())
        v = empty(M, self.pitch, like=x)
        self.gate_kernel.forward(sums, router_bias, gates, u, g, v, stream)
        y = _rows(y)
        _into(y, None if base is None else _rows(base), v, B)
        return u, g


class GemmBackward:
    """The backward pass, called like `cuda.prepared.PreparedBackward`; the columns of dy are contiguous."""

    def __init__(self, gate_kernel: GateKernel, layout: Layout, needs: tuple[bool, ...]):
        self.gate_kernel, self.tokens, self.needs = gate_kernel, layout.tokens, needs
        self.R, self.N = layout.mixture.total_rank, layout.mixture.num_experts
        self.columns, self.pitch = widths(layout)

    def __call__(self, operands: BackwardOperands, stream: int) -> Gradients:
        """The gradients, each in its parameter's dtype."""
        dy, dgates, x, u, g, A, B, router_weight, _ = operands
        need_x, need_A, need_B, need_router, need_bias, need_gates = self.needs
        M, R, N = self.tokens, self.R, self.N
        empty = self.gate_kernel.empty
        sums_x = need_A or need_router
        need_v = need_x or sums_x or need_bias or need_gates
        if need_v:  # dB alone needs no parameters
            W, packed_B = self.gate_kernel.parameters(operands, stream)
        rows, dy = _rows(x), None if dy is None else _rows(dy)
        t = product(dy, packed_B) if need_v and dy is not None else None
        v = empty(M, self.pitch, like=x) if need_B and dy is not None else None
        D = empty(M, self.columns, like=x) if need_x or sums_x else None
        dh = empty(M, N, like=g)
        self.gate_kernel.backward(t, u, g, dgates, v, D, dh, stream)
        dB = None
        if need_B:
            dB = torch.zeros_like(B) if v is None else product(dy.t(), v)[:, :R].to(B.dtype).contiguous()
        dA = drouter_weight = None
        if sums_x:
            first, last = 0 if need_A else R, R + N if need_router else R
            dW = product(D[:, first:last].t(), rows)
            dA = dW[:R].to(A.dtype) if need_A else None
            if need_router:
                drouter_weight = dW[R - first : R - first + N].to(router_weight.dtype)
        dx = None
        if need_x:
            dx = (torch.mm(D, W) if x.is_cuda else product(D, W).to(x.dtype)).view(x.shape)
        drouter_bias = dh.sum(0) if need_bias else None
        return Gradients(dx, dA, dB, drouter_weight, drouter_bias, dh if need_gates else None)
