"""Both passes of the CUDA kernels for every layout on one kind of device: a real one, or the emulated one."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

from torch import Tensor

from rode_kernels.backends.cuda.prepared import DropKernel, GateKernel, Kernels
from rode_kernels.backends.gpu import gemm_path
from rode_kernels.backends.gpu.layout import Layout, no_gradients, with_neighbouring_columns
from rode_kernels.backends.gpu.planner import plan_backward, plan_forward, prefer_gemm
from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape, divide_up
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.backends.gpu.siblings import (
    BackwardPlans,
    Columns,
    ForwardPlans,
    plan_siblings_backward,
    plan_siblings_forward,
)
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs

Forward = Callable[[ForwardOperands, Tensor, int], tuple[Tensor, Tensor]]  # of operands, y, stream: u and g
Backward = Callable[[BackwardOperands, int], Gradients]


def row_distance(t: Tensor | None) -> int:
    """Elements from row to row of a matrix; of one row, which has none, as many as allow wide copies."""
    if t is None:
        return 0
    return t.stride(0) if t.shape[0] > 1 else divide_up(t.shape[1], 8) * 8


class Passes:
    """Both passes of every layout on one kind of device: by the kernels or by the gemm path, made once.

    Args:
        limits: a device's multiprocessors and shared memory; prepares the device, too.
    """

    def __init__(self, kernels: Kernels, limits: Callable[[int], tuple[int, SharedMemory]]):
        self.kernels, self.limits = kernels, limits
        self.gate_kernel = lru_cache(maxsize=4096)(GateKernel)
        self.drop_kernel = lru_cache(maxsize=4096)(DropKernel)

    def plan_forward(self, of: ProblemShape, device: int) -> Plan:
        return plan_forward(of, *self.limits(device))

    def plan_backward(self, of: ProblemShape, device: int) -> BackwardPlan:
        return plan_backward(of, *self.limits(device))

    def prefer_gemm(self, layout: Layout, backward: bool = False) -> bool:
        return prefer_gemm(layout.shape, backward)

    def between_products(self, layout: Layout, device: int) -> tuple[GateKernel, DropKernel | None]:
        """The kernels that the gemm path runs between its products."""
        drop = self.drop_kernel(self.kernels, layout, device) if layout.shape.dropout else None
        return self.gate_kernel(self.kernels, layout, device), drop

    def may_multiply(self, layout: Layout) -> bool:
        """Whether PyTorch's product may stand in for a kernel that reads x: not with dropout, which would need a copy of it."""
        return not layout.shape.dropout

    def plan_siblings_forward(
        self, layouts: tuple[Layout, ...], columns: Columns, masks: int, device: int
    ) -> ForwardPlans | None:
        """Plans of mixtures that read the same x; None where calls one by one are faster, or the only way."""
        shapes = tuple(layout.shape for layout in layouts)
        packs = not any(any(layout.params_fp32) for layout in layouts)
        return plan_siblings_forward(
            shapes, columns.shape(shapes, masks), *self.limits(device), packs, self.always_together()
        )

    def plan_siblings_backward(
        self, layouts: tuple[Layout, ...], columns: Columns, masks: int, device: int
    ) -> BackwardPlans | None:
        """As `plan_siblings_forward`."""
        shapes = tuple(layout.shape for layout in layouts)
        packs = not any(any(layout.params_fp32) for layout in layouts)
        return plan_siblings_backward(
            shapes, columns.shape(shapes, masks), *self.limits(device), packs, self.always_together()
        )

    def always_together(self) -> bool:
        """Whether mixtures that read the same x run together even where that is slower."""
        return False

    def forward_of(self, layout: Layout, device: int, ld_x: int, ld_base: int, ld_y: int) -> Forward:
        """The kernels' forward pass, or that of the gemm path, for a layout and these row strides."""
        plan = self.plan_forward(layout.shape, device)
        if self.prefer_gemm(layout):
            return gemm_path.GemmForward(*self.between_products(layout, device), layout)
        return self.kernels.forward(layout, plan, device, ld_x, ld_base, ld_y)

    def backward_of(
        self, layout: Layout, device: int, ld_x: int, ld_dy: tuple[int, int] | None, needs: Needs
    ) -> Backward:
        """The kernels' backward pass, or that of the gemm path. ld_dy is None where there is no dy."""
        plan = self.plan_backward(layout.shape, device)
        # others it would copy
        plain = ld_dy is None or (ld_dy[1] == 1 and ld_dy[0] >= layout.shape.out_features)
        if plain and self.prefer_gemm(layout, backward=True):
            return gemm_path.GemmBackward(*self.between_products(layout, device), layout, needs)
        return self.kernels.backward(layout, plan, device, ld_x, ld_dy or (0, 0), needs)

    def forward(
        self, operands: ForwardOperands, settings: Settings, inplace: bool, device: int, stream: int
    ) -> Outputs:
        """The forward pass, see `reference.forward`."""
        x, base = with_neighbouring_columns(operands.x), with_neighbouring_columns(operands.base)
        operands = with_contiguous_parameters(operands)._replace(x=x, base=base)
        shape = x.shape[0], operands.B.shape[0]
        y = base if inplace and base is not None else self.kernels.empty(*shape, like=x)
        run = self.forward_of(Layout.of(operands, settings), device, *map(row_distance, (x, base, y)))
        return y, *run(operands, y, stream)

    def backward(
        self, operands: BackwardOperands, settings: Settings, needs: Needs, device: int, stream: int
    ) -> Gradients:
        """The backward pass, see `reference.backward`."""
        dy, x = operands.dy, with_neighbouring_columns(operands.x)
        if x.shape[0] == 0 or not any(needs):
            return no_gradients(operands, needs)
        if dy is not None and dy.stride() == (0, 0):  # of a sum: a row of it can be copied 16 bytes at a time
            dy = dy[:1].contiguous().expand(dy.shape)
        operands = with_contiguous_parameters(operands)._replace(dy=dy, x=x)
        ld_dy = None if dy is None else (dy.stride(0), dy.stride(1))
        run = self.backward_of(Layout.of(operands, settings), device, row_distance(x), ld_dy, needs)
        return run(operands, stream)


_Operands = TypeVar("_Operands", ForwardOperands, BackwardOperands)


def with_contiguous_parameters(operands: _Operands) -> _Operands:
    W = operands.router_weight
    return operands._replace(
        A=operands.A.contiguous(),
        B=operands.B.contiguous(),
        router_weight=None if W is None else W.contiguous(),
    )
