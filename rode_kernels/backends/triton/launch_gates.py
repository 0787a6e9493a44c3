"""The gemm path (`rode_kernels.backends.gpu.gemm_path`) with Triton kernels between the products."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from rode_kernels.backends.gpu import gemm_path
from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.backends.triton import gate_kernels, tune
from rode_kernels.backends.triton.tiles import columns
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, Settings

BLOCK_M, BLOCK_R = 16, 64
OPTIONS = dict(num_warps=4, num_stages=2, **tune.ALWAYS)


class GateKernel:
    """`rode_kernels.backends.gpu.gemm_path.GateKernel` by Triton kernels."""

    def __init__(self, layout: Layout):
        self.columns, self.pitch = gemm_path.widths(layout)
        self.R, self.N = layout.mixture.total_rank, layout.mixture.num_experts
        self.constants = dict(
            **columns(layout.mixture, 0.0),
            N=self.N,
            R=self.R,
            COLUMNS=self.columns,
            PITCH=self.pitch,
            ROUTED=layout.routed,
            DENSE=layout.dense,
            BLOCK_M=BLOCK_M,
            BLOCK_R=BLOCK_R,
            BLOCK_N=max(16, triton.next_power_of_2(max(self.N, self.columns - self.R))),
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
        B = B.to(x.dtype)
        return W, torch.nn.functional.pad(B, (0, self.pitch - self.R)) if self.pitch != self.R else B

    def forward(self, sums, bias, gates, u, g, v, stream) -> None:
        M, constants = u.shape[0], dict(**self.constants, HAS_BIAS=bias is not None)
        grid = divide_up(M, BLOCK_M), divide_up(self.pitch, BLOCK_R)

        def run(_: Tensor, **options) -> None:
            gate_kernels.apply_gates[grid](sums, bias, g, u, v, M, **constants, **options)

        tune.tuned("apply_gates", constants, u.dtype, [OPTIONS], run, u)

    def backward(self, t, u, g, dgates, v, D, dh, stream) -> None:
        M, constants = (
            u.shape[0],
            dict(
                **self.constants,
                HAS_DY=t is not None,
                HAS_DGATES=dgates is not None,
                NEED_V=v is not None,
                NEED_D=D is not None,
            ),
        )

        def run(_: Tensor, **options) -> None:
            grid = (divide_up(M, BLOCK_M),)
            gate_kernels.apply_gates_backward[grid](t, u, g, dgates, v, D, dh, M, **constants, **options)

        tune.tuned("apply_gates_backward", constants, u.dtype, [OPTIONS], run, u)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, see `reference.forward`, without dropout; closed experts are multiplied with zeros."""
    layout = Layout.of(operands, settings)
    x, bias, gates = operands.x, operands.router_bias, operands.gates
    y = operands.base if inplace else x.new_empty(x.shape[0], operands.B.shape[0])
    operands = operands._replace(
        router_bias=None if bias is None else bias.float().contiguous(),
        gates=None if gates is None else gates.contiguous(),
    )
    return y, *gemm_path.GemmForward(GateKernel(layout), layout)(operands, y, 0)


def backward(operands: BackwardOperands, settings: Settings, needs: tuple[bool, ...]) -> Gradients:
    """The backward pass, see `reference.backward`, without dropout."""
    layout, dgates = Layout.of(operands, settings), operands.dgates
    operands = operands._replace(dgates=None if dgates is None else dgates.contiguous())
    return gemm_path.GemmBackward(GateKernel(layout), layout, needs)(operands, 0)
