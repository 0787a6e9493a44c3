"""Calls of the CUDA kernels: addresses of torch tensors, on a stream. A device and its emulation share this file.

`PreparedForward` and `PreparedBackward` are passes decided for sizes, strides and dtypes. They are made once and called many
times: with few tokens the host needs longer to launch than the device to run. `rode_kernels.backends.gpu.gemm_path` has the same
two, with matrix products by PyTorch.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import lru_cache, partial
from types import ModuleType

import torch
from torch import Tensor

from rode_kernels.backends.gpu.gemm_path import GateGradients, GateTensors, widths
from rode_kernels.backends.gpu.layout import Layout, tf32_allowed
from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, column_tiles, divide_up
from rode_kernels.backends.native import problem_arguments
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients
from rode_kernels.passes import Needs


def address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class Kernels:
    """Makes passes on one native module.

    Args:
        native: the compiled module, `_cuda` or `_cuda_emulated`. Without it a backend is not available, and no pass is made.
    """

    def __init__(self, native: ModuleType):
        self.native = native
        self.forward = lru_cache(maxsize=4096)(partial(PreparedForward, self))
        self.backward = lru_cache(maxsize=4096)(partial(PreparedBackward, self))

    def problem(self, layout: Layout) -> dict[str, object]:
        """The arguments of native objects that every pass has."""
        shape = layout.shape
        return problem_arguments(
            layout.dtype, shape.tokens, shape.in_features, shape.out_features, layout.settings
        )

    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


class Packing:
    """Parameters side by side in x's type: W, which is A above the router above zeros, and B.

    Args:
        rows: of W. pitch_K, pitch_R: elements of a row of W, and of B. with_B: whether B is packed too.
    """

    def __init__(
        self,
        kernels: Kernels,
        layout: Layout,
        device: int,
        rows: int,
        pitch_K: int,
        pitch_R: int,
        with_B: bool,
    ):
        self.kernels, self.with_B = kernels, with_B
        self.shape_W, self.shape_B = (rows, pitch_K), (layout.shape.out_features, pitch_R)
        self.run = kernels.native.Pack(
            **kernels.problem(layout),
            params_fp32=layout.params_fp32,
            rows=rows,
            pitch_K=pitch_K,
            pitch_R=pitch_R,
            device=device,
        )

    def __call__(self, operands: AnyOperands, stream: int) -> tuple[Tensor, Tensor]:
        """W and B; B itself if it is not packed. A, B and router_weight are contiguous."""
        x, A, B, router_weight = operands.x, operands.A, operands.B, operands.router_weight
        empty = self.kernels.empty
        W = empty(*self.shape_W, like=x)
        packed_B = empty(*self.shape_B, like=x) if self.with_B else None
        self.run(address(A), address(router_weight), address(B), address(W), address(packed_B), stream)
        return W, B if packed_B is None else packed_B


class Parameters:
    """A, the router's weights and B as the kernels take them: as they are, or packed where any is float32 beside a 16-bit x.

    Attributes:
        pitch_K, pitch_R: elements of a row of A and the router's, and of B.
    """

    def __init__(self, kernels: Kernels, layout: Layout, device: int):
        K, R = layout.shape.in_features, layout.shape.total_rank
        self.pitch_K, self.pitch_R, self.pack = K, R, None
        if any(layout.params_fp32):
            self.pitch_K, self.pitch_R = divide_up(K, 8) * 8, divide_up(R, 8) * 8
            rows = R + layout.shape.routed_experts
            self.pack = Packing(kernels, layout, device, rows, self.pitch_K, self.pitch_R, True)
        self.router_at = R * self.pitch_K * layout.dtype.itemsize

    def __call__(self, operands: AnyOperands, stream: int) -> tuple[Tensor, int, Tensor]:
        """A, the address of the router's weights (0: none), and B, to be kept until the kernels are launched."""
        router_weight = operands.router_weight
        if self.pack is None:
            return operands.A, address(router_weight), operands.B
        W, B = self.pack(operands, stream)
        return W, 0 if router_weight is None else W.data_ptr() + self.router_at, B


class PreparedForward:
    """The forward pass by the kernels that a plan names.

    Args:
        ld_x, ld_base, ld_y: elements from row to row.
    """

    def __init__(
        self, kernels: Kernels, layout: Layout, plan: Plan, device: int, ld_x: int, ld_base: int, ld_y: int
    ):
        M, R, routed_N = layout.shape.tokens, layout.shape.total_rank, layout.shape.routed_experts
        plan.check(R, routed_N, layout.dtype.itemsize)
        self.kernels, self.tokens, self.R, self.N = kernels, M, R, layout.shape.experts
        self.fp32 = layout.dtype == torch.float32
        self.parameters = Parameters(kernels, layout, device)
        self.partial = None
        if not plan.fused:
            self.partial = plan.splits, M, 8 * column_tiles(R, routed_N)
        self.run = kernels.native.ForwardLaunch(
            **kernels.problem(layout),
            ld_x=ld_x,
            ld_base=ld_base,
            ld_y=ld_y,
            ld_A=self.parameters.pitch_K,
            ld_B=self.parameters.pitch_R,
            **asdict(plan),
            device=device,
        )

    def __call__(self, operands: ForwardOperands, y: Tensor, stream: int) -> tuple[Tensor, Tensor]:
        """Writes y; gives u and g. Parameters, the bias (float32) and gates are contiguous; x, base and y may have any leading
        dimensions."""
        x, _, _, _, router_bias, gates, base, seed = operands
        empty, floats = self.kernels.empty, torch.float32
        u = empty(self.tokens, self.R, like=x, dtype=floats)
        g = empty(self.tokens, self.N, like=x, dtype=floats) if gates is None else gates
        if self.tokens == 0:
            return u, g
        partial = None if self.partial is None else empty(*self.partial, like=x, dtype=floats)
        A, router, B = self.parameters(operands, stream)
        self.run(
            x.data_ptr(),
            address(base),
            y.data_ptr(),
            A.data_ptr(),
            router,
            B.data_ptr(),
            address(router_bias),
            address(gates),
            u.data_ptr(),
            g.data_ptr() if gates is None else 0,
            address(partial),
            address(seed),
            self.fp32 and tf32_allowed(),
            stream,
        )
        return u, g


class PreparedBackward:
    """The backward pass by the kernels that a plan names.

    Args:
        ld_x, ld_dy: elements from row to row; of dy also from column to column.
        needs: whether gradients of x, A, B, the router's weight and bias, and gates are wanted.
    """

    def __init__(
        self,
        kernels: Kernels,
        layout: Layout,
        plan: BackwardPlan,
        device: int,
        ld_x: int,
        ld_dy: tuple[int, int],
        needs: Needs,
    ):
        plan.check(layout.dtype.itemsize)
        M, K, O = layout.shape.tokens, layout.shape.in_features, layout.shape.out_features
        R, N = layout.shape.total_rank, layout.shape.experts
        need_x, need_A, need_B, need_router, need_bias, need_gates = needs
        self.kernels, self.needs, self.tokens, self.N = kernels, needs, M, N
        self.fp32 = layout.dtype == torch.float32
        sums_x = need_A or need_router
        self.need_v = need_x or sums_x or need_bias or need_gates
        self.parameters = Parameters(kernels, layout, device)
        tiles, groups = divide_up(R, 8), divide_up(R, 16) + divide_up(layout.shape.routed_experts, 16)
        splits_y, splits_x = divide_up(M, plan.tokens_per_split_y), divide_up(M, plan.tokens_per_split_x)
        # Intermediate results stand in one piece of memory: each part's size, and the multiple of 256 bytes at which it begins.
        parts = {
            "D": (self.need_v, M * 16 * groups * layout.dtype.itemsize),
            "open": (self.need_v, divide_up(M, 16) * 4),
            "t": (self.need_v, plan.o_tiles * divide_up(M, 16) * tiles * 128 * 4),
            "dB_partial": (need_B, splits_y * O * 8 * tiles * 4),
            "weights_partial": (sums_x, splits_x * 16 * groups * divide_up(K, 8) * 8 * 4),
            "dbias_partial": (need_bias, divide_up(M, 16) * N * 4),
        }
        self.scratch_bytes = 0
        self.offsets: dict[str, int | None] = {}
        for name, (needed, size) in parts.items():
            self.offsets[name] = self.scratch_bytes if needed else None
            self.scratch_bytes += divide_up(size, 256) * 256 if needed else 0
        self.run = kernels.native.BackwardLaunch(
            **kernels.problem(layout),
            ld_x=ld_x,
            ld_dy=ld_dy,
            ld_A=self.parameters.pitch_K,
            ld_B=self.parameters.pitch_R,
            params_fp32=layout.params_fp32,
            **asdict(plan),
            device=device,
        )

    def __call__(self, operands: BackwardOperands, stream: int) -> Gradients:
        """The gradients, each in its parameter's dtype. Parameters and dgates (float32) are contiguous; x and dy may have any
        leading dimensions."""
        dy, dgates, x, u, g, A, B, router_weight, seed = operands
        need_x, need_A, need_B, need_router, need_bias, need_gates = self.needs
        M, N = self.tokens, self.N
        empty = self.kernels.empty
        dx = empty(*x.shape, like=x) if need_x else None
        dA = empty(*A.shape, like=A) if need_A else None
        dB = empty(*B.shape, like=B) if need_B else None
        drouter_weight = None
        if need_router and router_weight is not None:
            drouter_weight = empty(*router_weight.shape, like=router_weight)
        drouter_bias = empty(N, like=g) if need_bias else None
        dh = empty(M, N, like=g) if self.need_v else None
        if dB is not None and dy is None:
            dB.zero_()
        A, router, B = self.parameters(operands, stream)
        scratch = empty(self.scratch_bytes, like=x, dtype=torch.uint8)
        start, offsets = scratch.data_ptr(), self.offsets

        def at(name: str, needed: bool = True) -> int:
            offset = offsets[name]
            return start + offset if needed and offset is not None else 0

        has_dy = dy is not None
        self.run(
            address(dy),
            x.data_ptr(),
            A.data_ptr(),
            router,
            B.data_ptr(),
            u.data_ptr(),
            g.data_ptr(),
            address(dgates),
            address(seed),
            address(dx),
            address(dA),
            address(drouter_weight),
            address(dB) if has_dy else 0,
            address(drouter_bias),
            address(dh),
            at("D"),
            at("open"),
            at("t", has_dy),
            at("dB_partial", has_dy),
            at("weights_partial"),
            at("dbias_partial"),
            self.fp32 and tf32_allowed(),
            stream,
        )
        return Gradients(dx, dA, dB, drouter_weight, drouter_bias, dh if need_gates else None)


class DropKernel:
    """`rode_kernels.backends.gpu.gemm_path.DropKernel` by these kernels, for one mask or several."""

    def __init__(self, kernels: Kernels, layout: Layout, device: int, masks: int = 1):
        self.run = kernels.native.Drop(**kernels.problem(layout), device=device, masks=masks)

    def __call__(self, source: Tensor, to: Tensor, seed: Tensor, first: int, stream: int) -> None:
        rows, ld_from = source.shape[0], source.stride(0)
        self.run(source.data_ptr(), to.data_ptr(), seed.data_ptr(), first, rows, ld_from, stream)


class GateKernel:
    """`rode_kernels.backends.gpu.gemm_path.GateKernel` by these kernels."""

    def __init__(self, kernels: Kernels, layout: Layout, device: int):
        self.empty, self.pack = kernels.empty, None
        shape, (columns, pitch) = layout.shape, widths(layout)
        with_B = layout.params_fp32[2] or pitch != shape.total_rank
        if with_B or layout.params_fp32[0] or shape.routed or columns != shape.total_rank:
            pitch_K = divide_up(shape.in_features, 8) * 8
            self.pack = Packing(kernels, layout, device, columns, pitch_K, pitch, with_B)
        self.in_features = shape.in_features
        self.native = kernels.native.ApplyGates(
            **kernels.problem(layout),
            routed=shape.routed,
            columns=columns,
            pitch_R=pitch,
            device=device,
        )

    def parameters(self, operands: AnyOperands, stream: int) -> tuple[Tensor, Tensor]:
        if self.pack is None:
            return operands.A, operands.B
        W, B = self.pack(operands, stream)
        return W if W.shape[1] == self.in_features else W[:, : self.in_features], B

    def forward(self, tensors: GateTensors, stream: int) -> None:
        sums, bias, gates, u, g, v = tensors
        self.native.forward(*map(address, (sums, bias, gates, u, g if gates is None else None, v)), stream)

    def backward(self, tensors: GateGradients, stream: int) -> None:
        self.native.backward(*map(address, tensors), stream)
