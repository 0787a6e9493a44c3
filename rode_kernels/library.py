"""Passes of mixtures so wide that products decide: PyTorch's library multiplies, and one kernel stands between its products.

The formulas are those of `rode_kernels.reference`, gates are selected and numbers rounded as in the kernels; closed experts are
multiplied with zeros instead of being skipped. Which calls go this way, `rode_kernels.plan.by_library` says, and why.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rode_kernels.cuda_kernels import Kernels, Layout, Packing, address, divide_up


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


class _Shapes:
    """What both passes have: W (columns, K), which is [A; router; zeros], and B (O, pitch), both of widths that a library likes."""

    def __init__(self, kernels: Kernels, layout: Layout, device: int):
        self.R, self.N = layout.mixture.total_rank, layout.mixture.num_experts
        self.kernels, self.layout, self.device = kernels, layout, device
        K = layout.in_features
        self.columns = divide_up(self.R + (self.N if layout.routed else 0), 8) * 8
        self.pitch = divide_up(self.R, 8) * 8
        as_it_is = not layout.wide[0] and not layout.routed and self.columns == self.R
        with_B = layout.wide[2] or self.pitch != self.R
        self.pack = None
        if with_B or not as_it_is:
            pitch_K = divide_up(K, 8) * 8
            self.pack = Packing(kernels, layout, device, self.columns, pitch_K, self.pitch, with_B)
        self.native = kernels.native.Weigh(
            **kernels.problem(layout),
            routed=layout.routed,
            columns=self.columns,
            pitch_R=self.pitch,
            device=device,
        )

    def parameters(
        self, x: Tensor, A: Tensor, B: Tensor, router_weight: Tensor | None, stream: int
    ) -> tuple[Tensor, Tensor]:
        if self.pack is None:
            return A, B
        W, B = self.pack(x, A, B, router_weight, stream)
        K = self.layout.in_features
        return W if W.shape[1] == K else W[:, :K], B


class Forward(_Shapes):
    """As `cuda_kernels.Forward`."""

    def __call__(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        router_weight: Tensor | None,
        router_bias: Tensor | None,
        gates: Tensor | None,
        base: Tensor | None,
        y: Tensor,
        seed: Tensor | None,
        stream: int,
    ) -> tuple[Tensor, Tensor]:
        """Writes y; gives u and g."""
        M, floats = self.layout.tokens, torch.float32
        empty = self.kernels.empty
        u = empty(M, self.R, like=x, dtype=floats)
        g = empty(M, self.N, like=x, dtype=floats) if gates is None else gates
        if M == 0:
            return u, g
        W, B = self.parameters(x, A, B, router_weight, stream)
        sums = product(_rows(x), W.t())
        v = empty(M, self.pitch, like=x)
        self.native.forward(
            sums.data_ptr(),
            address(router_bias),
            address(gates),
            u.data_ptr(),
            g.data_ptr() if gates is None else 0,
            v.data_ptr(),
            stream,
        )
        y = _rows(y)
        _into(y, None if base is None else _rows(base), v, B)
        return u, g


class Backward(_Shapes):
    """As `cuda_kernels.Backward`; columns of dy are neighbours."""

    def __init__(self, kernels: Kernels, layout: Layout, device: int, needs: tuple[bool, ...]):
        super().__init__(kernels, layout, device)
        self.needs = needs

    def __call__(
        self,
        dy: Tensor | None,
        dgates: Tensor | None,
        x: Tensor,
        u: Tensor,
        g: Tensor,
        A: Tensor,
        B: Tensor,
        router_weight: Tensor | None,
        seed: Tensor | None,
        stream: int,
    ) -> list[Tensor | None]:
        """Gradients of x, A, B, the router's weight and bias, and gates, in their parameter's type."""
        need_x, need_A, need_B, need_router, need_bias, need_gates = self.needs
        M, R, N = self.layout.tokens, self.R, self.N
        empty = self.kernels.empty
        sums_x = need_A or need_router
        need_v = need_x or sums_x or need_bias or need_gates
        W, packed_B = self.parameters(x, A, B, router_weight, stream)
        rows, dy = _rows(x), None if dy is None else _rows(dy)
        t = product(dy, packed_B) if need_v and dy is not None else None
        v = empty(M, self.pitch, like=x) if need_B and dy is not None else None
        D = empty(M, self.columns, like=x) if need_x or sums_x else None
        dh = empty(M, N, like=g)
        self.native.backward(
            address(t),
            u.data_ptr(),
            g.data_ptr(),
            address(dgates),
            address(v),
            address(D),
            dh.data_ptr(),
            stream,
        )
        dB = None
        if need_B:
            dB = torch.zeros_like(B) if v is None else product(dy.t(), v)[:, :R].to(B.dtype)
        dA = dW = None
        if sums_x:
            first, last = 0 if need_A else R, R + N if need_router else R
            of_W = product(D[:, first:last].t(), rows)
            dA = of_W[:R].to(A.dtype) if need_A else None
            dW = of_W[R - first : R - first + N].to(router_weight.dtype) if need_router else None
        dx = None
        if need_x:
            dx = (torch.mm(D, W) if x.is_cuda else product(D, W).to(x.dtype)).view(x.shape)
        return [dx, dA, dB, dW, dh.sum(0) if need_bias else None, dh if need_gates else None]
