"""Passes with matrix products by PyTorch, for mixtures of many columns. One kernel runs between the products.

The formulas are those of `rode_kernels.backends.reference`. Gates are selected and numbers rounded as in the kernels. Closed
experts are multiplied with zeros instead of being skipped. With dropout the experts' products read a copy of x without what is
dropped, a part of the tokens at a time, in memory of a fixed size. `rode_kernels.backends.gpu.planner.prefer_gemm` decides which
calls take this path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, MaybeTensor
from rode_kernels.passes import Needs

SCRATCH_BYTES = 2**26  # of the copy that dropout takes, if a token has no more


def product(a: Tensor, b: Tensor) -> Tensor:
    """The float32 sums of a b."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())  # for the emulator


def add_product(y: Tensor, base: Tensor | None, v: Tensor, B: Tensor) -> None:
    """y = base + v B^T, rounded once; y may be base."""
    if not y.is_cuda and y.dtype != torch.float32:
        sums = product(v, B.t())
        y.copy_(sums if base is None else sums + base)
    elif base is None:
        torch.mm(v, B.t(), out=y)
    else:
        torch.addmm(base, v, B.t(), out=y)


def rounded_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in their dtype."""
    return torch.mm(a, b) if a.is_cuda else product(a, b).to(a.dtype)


def add_to_gradient(dx: Tensor, D: Tensor, W: Tensor) -> Tensor:
    """dx += D W, rounded once."""
    return dx.addmm_(D, W) if dx.is_cuda else dx.add_(product(D, W))


def _rows(t: MaybeTensor) -> MaybeTensor:
    return t if t is None or t.dim() == 2 else t.view(-1, t.shape[-1])


def widths(layout: Layout) -> tuple[int, int]:
    """Columns of W's products and of D, and those of v and t: multiples of 8, which matrix products need to be fast."""
    R = layout.shape.total_rank
    return divide_up(R + layout.shape.routed_experts, 8) * 8, divide_up(R, 8) * 8


class GateTensors(NamedTuple):
    """Tensors of the gate kernel in the forward pass; (columns, pitch) are `widths`.

    Attributes:
        sums: x W^T (M, columns), float32. bias, gates: as in `ForwardOperands`.
        u: (M, R), to be written. g: (M, N), to be written if gates are None. v: (M, pitch), to be written.
    """

    sums: Tensor
    bias: Tensor | None
    gates: Tensor | None
    u: Tensor
    g: Tensor
    v: Tensor


class GateGradients(NamedTuple):
    """Tensors of the gate kernel in the backward pass.

    Attributes:
        t: dy B (M, pitch), float32, or None. u, g, dgates: as in `BackwardOperands`.
        v: (M, pitch), to be written again. D: (M, columns), to be written: du, then the logits' gradients, then zeros. None: not
            wanted.
        dh: (M, N), to be written: the logits' gradients in float32, or those of given gates.
    """

    t: Tensor | None
    u: Tensor
    g: Tensor
    dgates: Tensor | None
    v: Tensor | None
    D: Tensor | None
    dh: Tensor


class GateKernel(Protocol):
    """The kernel between the products, on one backend, for one layout."""

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...

    def parameters(self, operands: AnyOperands, stream: int) -> tuple[Tensor, Tensor]:
        """In x's dtype: W (columns, K), which is A above the router's weights above zeros, and B (O, pitch), zeros at the end."""

    def forward(self, tensors: GateTensors, stream: int) -> None: ...

    def backward(self, tensors: GateGradients, stream: int) -> None: ...


class DropKernel(Protocol):
    """Dropout on one backend, for one layout."""

    def __call__(self, source: Tensor, to: Tensor, seed: Tensor, first: int, stream: int) -> None:
        """Writes rows to `to`, zeros for what is dropped. The first one is row `first` of x; `to` may be `source`. With several
        masks `seed` has one seed for each, and `to` a copy of the rows."""


def tokens_of_a_part(x: Tensor, copies: int = 1) -> int:
    """Rows of x that are copied at a time: as many as `SCRATCH_BYTES` hold, in whole tiles of 64 if there are so many."""
    most = max(1, SCRATCH_BYTES // (copies * x.shape[1] * x.element_size()))
    return most // 64 * 64 or most


def parts_of(x: Tensor, copies: int = 1) -> Iterator[slice]:
    """The rows of each part."""
    M, most = x.shape[0], tokens_of_a_part(x, copies)
    return (slice(first, min(first + most, M)) for first in range(0, M, most))


class Dropout:
    """Copies of x without what is dropped, one for each mask, one part of the tokens after the other in the same memory."""

    def __init__(self, kernel: DropKernel, gate_kernel: GateKernel, masks: int = 1):
        self.kernel, self.gate_kernel, self.masks = kernel, gate_kernel, masks

    def parts(self, x: Tensor, seed: Tensor, stream: int) -> Iterator[tuple[slice, Tensor]]:
        """The tokens of each part, and its copies (masks, tokens, K)."""
        (M, K), masks = x.shape, self.masks
        scratch = self.gate_kernel.empty(masks * min(tokens_of_a_part(x, masks), M), K, like=x)
        for tokens in parts_of(x, masks):
            rows = tokens.stop - tokens.start
            copies = scratch[: masks * rows].view(masks, rows, K)
            self.kernel(x[tokens], copies, seed, tokens.start, stream)
            yield tokens, copies


class GemmForward:
    """The forward pass, called like `cuda.prepared.PreparedForward`. drop_kernel is None without dropout."""

    def __init__(self, gate_kernel: GateKernel, drop_kernel: DropKernel | None, layout: Layout):
        self.gate_kernel, self.shape = gate_kernel, layout.shape
        self.dropout = None if drop_kernel is None else Dropout(drop_kernel, gate_kernel)
        self.columns, self.pitch = widths(layout)

    def _sums(self, x: Tensor, W: Tensor, seed: Tensor | None, stream: int) -> Tensor:
        if self.dropout is None or seed is None:
            return product(x, W.t())
        R = self.shape.total_rank
        sums = x.new_empty(x.shape[0], self.columns, dtype=torch.float32)
        if self.columns > R:  # the router sees all of x
            sums[:, R:] = product(x, W[R:].t())
        for tokens, copies in self.dropout.parts(x, seed, stream):
            sums[tokens, :R] = product(copies[0], W[:R].t())
        return sums

    def __call__(self, operands: ForwardOperands, y: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """Writes y; gives u and g."""
        x, _, _, _, router_bias, gates, base, seed = operands
        M, empty, floats = self.shape.tokens, self.gate_kernel.empty, torch.float32
        u = empty(M, self.shape.total_rank, like=x, dtype=floats)
        g = empty(M, self.shape.experts, like=x, dtype=floats) if gates is None else gates
        if M == 0:
            return u, g
        W, B = self.gate_kernel.parameters(operands, stream)
        sums = self._sums(_rows(x), W, seed, stream)
        v = empty(M, self.pitch, like=x)
        self.gate_kernel.forward(GateTensors(sums, router_bias, gates, u, g, v), stream)
        add_product(_rows(y), _rows(base), v, B)
        return u, g


class GemmBackward:
    """The backward pass, called like `cuda.prepared.PreparedBackward`; the columns of dy are contiguous."""

    def __init__(self, gate_kernel: GateKernel, drop_kernel: DropKernel | None, layout: Layout, needs: Needs):
        self.gate_kernel, self.shape, self.needs = gate_kernel, layout.shape, needs
        self.dropout = None if drop_kernel is None else Dropout(drop_kernel, gate_kernel)
        self.columns, self.pitch = widths(layout)

    def _weight_sums(self, x: Tensor, D: Tensor, seed: Tensor | None, stream: int) -> Tensor:
        """The sums of dA and of the router's gradient, one above the other, those that are needed."""
        _, need_A, _, need_router, *_ = self.needs
        R, N = self.shape.total_rank, self.shape.experts
        first, last = 0 if need_A else R, R + N if need_router else R
        if self.dropout is None or seed is None or not need_A:
            return product(D[:, first:last].t(), x)
        sums = torch.zeros(last, x.shape[1], dtype=torch.float32, device=x.device)
        for tokens, copies in self.dropout.parts(x, seed, stream):
            sums[:R] += product(D[tokens, :R].t(), copies[0])
        if need_router:
            sums[R:] = product(D[:, R:last].t(), x)
        return sums

    def _input_gradient(self, D: Tensor, W: Tensor, x: Tensor, seed: Tensor | None, stream: int) -> Tensor:
        if self.dropout is None or seed is None:
            return rounded_product(D, W)
        R = self.shape.total_rank
        dx = rounded_product(D[:, :R], W[:R])
        self.dropout.kernel(dx, dx, seed, 0, stream)
        if not self.shape.routed:
            return dx
        return add_to_gradient(dx, D[:, R:], W[R:])

    def __call__(self, operands: BackwardOperands, stream: int) -> Gradients:
        """The gradients, each in its parameter's dtype."""
        dy, dgates, x, u, g, A, B, router_weight, seed = operands
        need_x, need_A, need_B, need_router, need_bias, need_gates = self.needs
        M, R, N = self.shape.tokens, self.shape.total_rank, self.shape.experts
        empty, dy = self.gate_kernel.empty, _rows(dy)
        sums_x = need_A or need_router
        dx = dA = dB = drouter_weight = t = v = D = None
        if need_x or sums_x or need_bias or need_gates:  # dB alone needs no parameters
            W, packed_B = self.gate_kernel.parameters(operands, stream)
            t = None if dy is None else product(dy, packed_B)
        if need_B and dy is not None:
            v = empty(M, self.pitch, like=x)
        if need_x or sums_x:
            D = empty(M, self.columns, like=x)
        dh = empty(M, N, like=g)
        self.gate_kernel.backward(GateGradients(t, u, g, dgates, v, D, dh), stream)
        if dy is not None and v is not None:
            dB = product(dy.t(), v)[:, :R].to(B.dtype).contiguous()
        elif need_B:
            dB = torch.zeros_like(B)
        if D is not None and sums_x:
            dW = self._weight_sums(_rows(x), D, seed, stream)
            dA = dW[:R].to(A.dtype) if need_A else None
            if router_weight is not None and need_router:
                drouter_weight = dW[-N:].to(router_weight.dtype)
        if D is not None and need_x:
            dx = self._input_gradient(D, W, _rows(x), seed, stream).view(x.shape)
        drouter_bias = dh.sum(0) if need_bias else None
        return Gradients(dx, dA, dB, drouter_weight, drouter_bias, dh if need_gates else None)
