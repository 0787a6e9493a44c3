"""The gemm path (`rode_kernels.backends.gpu.gemm_path`) with Triton kernels between the products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from rode_kernels.backends.gpu import gemm_path, gemm_siblings
from rode_kernels.backends.gpu.gemm_path import GateGradients, GateTensors
from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.backends.triton import gate_kernels, tune
from rode_kernels.backends.triton.tiles import columns
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs

BLOCK_M, BLOCK_R = 16, 64
OPTIONS = dict(num_warps=4, num_stages=2, **tune.ALWAYS)


class GateKernel:
    """`rode_kernels.backends.gpu.gemm_path.GateKernel` by Triton kernels."""

    def __init__(self, layout: Layout):
        self.columns, self.pitch = gemm_path.widths(layout)
        R, N = layout.shape.total_rank, layout.shape.experts
        self.constants = dict(
            **columns(layout.settings.mixture, 0.0),
            **dict(N=N, R=R, COLUMNS=self.columns, PITCH=self.pitch),
            **dict(ROUTED=layout.shape.routed, DENSE=layout.settings.dense),
            **dict(BLOCK_M=BLOCK_M, BLOCK_R=BLOCK_R),
            BLOCK_N=max(16, triton.next_power_of_2(max(N, self.columns - R))),
        )

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return like.new_empty(shape, dtype=dtype or like.dtype)

    def parameters(self, operands: AnyOperands, stream: int) -> tuple[Tensor, Tensor]:
        x, B = operands.x, operands.B
        weights = [t for t in (operands.A, operands.router_weight) if t is not None]
        zeros = self.columns - sum(w.shape[0] for w in weights)
        weights = [w.to(x.dtype) for w in weights]
        if zeros:
            weights.append(x.new_zeros(zeros, x.shape[-1]))
        W = weights[0] if len(weights) == 1 else torch.cat(weights)
        B, zeros_B = B.to(x.dtype), self.pitch - B.shape[1]
        return W, torch.nn.functional.pad(B, (0, zeros_B)) if zeros_B else B

    def forward(self, tensors: GateTensors, stream: int) -> None:
        sums, bias, _, u, g, v = tensors
        M, constants = u.shape[0], dict(**self.constants, HAS_BIAS=bias is not None)
        grid, arguments = (divide_up(M, BLOCK_M), divide_up(self.pitch, BLOCK_R)), (sums, bias, g, u, v, M)
        tune.launch(gate_kernels, "apply_gates", grid, arguments, constants, u.dtype, [OPTIONS], u)

    def backward(self, tensors: GateGradients, stream: int) -> None:
        t, u, _, dgates, v, D, _ = tensors
        M = u.shape[0]
        constants = dict(
            **self.constants,
            **dict(HAS_DY=t is not None, HAS_DGATES=dgates is not None),
            **dict(NEED_V=v is not None, NEED_D=D is not None),
        )
        grid, arguments = (divide_up(M, BLOCK_M),), (*tensors, M)
        tune.launch(gate_kernels, "apply_gates_backward", grid, arguments, constants, u.dtype, [OPTIONS], u)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
    """The forward pass, see `reference.forward`, without dropout; closed experts are multiplied with zeros."""
    layout, x, base = Layout.of(operands, settings), operands.x, operands.base
    y = base if inplace and base is not None else x.new_empty(x.shape[0], operands.B.shape[0])
    return y, *gemm_path.GemmForward(GateKernel(layout), None, layout)(operands, y, 0)


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The backward pass, see `reference.backward`, without dropout."""
    layout = Layout.of(operands, settings)
    return gemm_path.GemmBackward(GateKernel(layout), None, layout, needs)(operands, 0)


def forward_siblings(operands: Sequence[ForwardOperands], settings: Sequence[Settings]) -> list[Outputs]:
    """The forward passes of mixtures that read the same x, without dropout, in place where there is a base."""
    layouts = [Layout.of(o, s) for o, s in zip(operands, settings, strict=True)]
    ys = [o.x.new_empty(o.x.shape[0], o.B.shape[0]) if o.base is None else o.base for o in operands]
    return gemm_siblings.forward([GateKernel(layout) for layout in layouts], None, layouts, operands, ys, 0)


def backward_siblings(
    operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
) -> list[Gradients]:
    """The backward passes, without dropout; the first one has the sum of the gradients of x."""
    layouts = [Layout.of(o, s) for o, s in zip(operands, settings, strict=True)]
    gate_kernels = [GateKernel(layout) for layout in layouts]
    return gemm_siblings.backward(gate_kernels, None, layouts, operands, needs, 0)
