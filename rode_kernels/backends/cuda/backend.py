"""The CUDA backend: its kernels (`csrc/cuda`) on torch's current stream, or PyTorch's matrix products where those are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor

from rode_kernels.backends.cuda.prepared import DropKernel, GateKernel, Kernels
from rode_kernels.backends.gpu import gemm_path
from rode_kernels.backends.gpu.layout import Layout, beyond_kernels, no_gradients, with_neighbouring_columns
from rode_kernels.backends.gpu.planner import plan_backward, plan_forward, prefer_gemm
from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape, divide_up
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.backends.native import load
from rode_kernels.mixture import Mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import BackwardPass, ForwardPass, Needs, Outputs, PlainOperands

_native, _why_not = load(
    "_cuda", "built without nvcc, or with RODE_CUDA=off; reinstall where nvcc is to get it"
)

_Forward = Callable[[ForwardOperands, Tensor, int], tuple[Tensor, Tensor]]  # of operands, y, stream: u and g
_Backward = Callable[[BackwardOperands, int], Gradients]


@lru_cache(maxsize=1)
def status() -> tuple[bool, str]:
    """Whether the kernels can run here, and a line that says what they run with or why they cannot."""
    if _native is None:
        return False, _why_not
    if torch.version.hip:
        return False, "this torch is for AMD GPUs"
    built, driver = _native.runtime_version(), _native.driver_version()
    needs = f"built with CUDA {built // 1000}.{built % 1000 // 10} for sm_{_native.ARCHITECTURES.replace(',', ', sm_')}"
    if driver == 0:
        return False, f"no NVIDIA driver here ({needs})"
    if driver // 1000 < built // 1000:
        return False, f"the driver serves CUDA {driver // 1000}.{driver % 1000 // 10}, too old ({needs})"
    if not torch.cuda.is_available():
        return False, f"this torch sees no CUDA device ({needs})"
    return True, needs


def serves(architectures: Sequence[int], major: int, minor: int) -> bool:
    """Whether code for these compute capabilities (80 for 8.0) runs on a device: that of its generation up to its own, or the
    newest one's PTX, which a driver compiles for what came after."""
    return max(architectures) <= 10 * major + minor or any(
        a // 10 == major and a % 10 <= minor for a in architectures
    )


@lru_cache
def _device_refusal(device: int) -> str:
    properties = torch.cuda.get_device_properties(device)
    if serves([int(a) for a in _native.ARCHITECTURES.split(",")], properties.major, properties.minor):
        return ""
    return (
        f"the CUDA kernels were built for sm_{_native.ARCHITECTURES.replace(',', ', sm_')}, "
        f"cuda:{device} ({properties.name}) is sm_{properties.major}{properties.minor}"
    )


def refuses(x: Tensor, out_features: int, mixture: Mixture) -> str:
    """Why these kernels cannot serve a call on x's device; empty where they can."""
    return _device_refusal(x.device.index) or beyond_kernels(x, out_features, mixture)


@lru_cache
def _prepare(device: int) -> tuple[int, SharedMemory]:
    """Prepares a device, once: loads the kernels, which a stream capture must not surround, and asks for multiprocessors and
    shared memory."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"rode_kernels: the first call on cuda:{device} loads the kernels and cannot be captured; call once before"
        )
    _native.load_kernels(device)
    torch.cuda.current_blas_handle()  # for the gemm path
    memory = SharedMemory(_native, _native.max_shared(device))
    return torch.cuda.get_device_properties(device).multi_processor_count, memory


def _distance(t: Tensor | None) -> int:
    """Elements from row to row of a matrix; of one row, which has none, as many as allow wide copies."""
    if t is None:
        return 0
    return t.stride(0) if t.shape[0] > 1 else divide_up(t.shape[1], 8) * 8


class Passes:
    """Both passes of every layout on one kind of device: by the kernels or by the gemm path, made once."""

    def __init__(self, kernels: Kernels):
        self.kernels = kernels
        self.gate_kernel = lru_cache(maxsize=4096)(GateKernel)
        self.drop_kernel = lru_cache(maxsize=4096)(DropKernel)

    def plan_forward(self, of: ProblemShape, device: int) -> Plan:
        return plan_forward(of, *_prepare(device))

    def plan_backward(self, of: ProblemShape, device: int) -> BackwardPlan:
        return plan_backward(of, *_prepare(device))

    def prefer_gemm(self, layout: Layout, backward: bool = False) -> bool:
        return prefer_gemm(layout.shape, backward)

    def between_products(self, layout: Layout, device: int) -> tuple[GateKernel, DropKernel | None]:
        """The kernels that the gemm path runs between its products."""
        drop = self.drop_kernel(self.kernels, layout, device) if layout.shape.dropout else None
        return self.gate_kernel(self.kernels, layout, device), drop

    def forward_of(self, layout: Layout, device: int, ld_x: int, ld_base: int, ld_y: int) -> _Forward:
        """The kernels' forward pass, or that of the gemm path, for a layout and these row strides."""
        plan = self.plan_forward(layout.shape, device)  # prepares the device, too
        if self.prefer_gemm(layout):
            return gemm_path.GemmForward(*self.between_products(layout, device), layout)
        return self.kernels.forward(layout, plan, device, ld_x, ld_base, ld_y)

    def backward_of(
        self, layout: Layout, device: int, ld_x: int, ld_dy: tuple[int, int] | None, needs: Needs
    ) -> _Backward:
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
        operands = _with_contiguous_parameters(operands)._replace(x=x, base=base)
        shape = x.shape[0], operands.B.shape[0]
        y = base if inplace and base is not None else self.kernels.empty(*shape, like=x)
        run = self.forward_of(Layout.of(operands, settings), device, *map(_distance, (x, base, y)))
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
        operands = _with_contiguous_parameters(operands)._replace(dy=dy, x=x)
        ld_dy = None if dy is None else (dy.stride(0), dy.stride(1))
        run = self.backward_of(Layout.of(operands, settings), device, _distance(x), ld_dy, needs)
        return run(operands, stream)


_Operands = TypeVar("_Operands", ForwardOperands, BackwardOperands)


def _with_contiguous_parameters(operands: _Operands) -> _Operands:
    W = operands.router_weight
    return operands._replace(
        A=operands.A.contiguous(),
        B=operands.B.contiguous(),
        router_weight=None if W is None else W.contiguous(),
    )


_passes = Passes(Kernels(_native))


# Gives the address of the stream that current_stream() would make an object for. It is not public, but compiled graphs use it.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


def _on_stream(run: Callable[[*_Arguments, int], _Result], device: int, *args: *_Arguments) -> _Result:
    """run(*args, stream): with the device made current, for the native runtime does, and given back."""
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _on_stream(run, device, *args)
    stream = _raw_stream(device) if _raw_stream else torch.cuda.current_stream(device).cuda_stream
    return run(*args, stream)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
    """The forward pass, see `reference.forward`; closed experts are skipped by tile."""
    device = operands.x.device.index
    return _on_stream(_passes.forward, device, operands, settings, inplace, device)


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The backward pass, see `reference.backward`; closed experts are skipped by tile."""
    device = operands.x.device.index
    return _on_stream(_passes.backward, device, operands, settings, needs, device)


def prepare(
    operands: ForwardOperands, settings: Settings, inplace: bool, shape: tuple[int, ...]
) -> ForwardPass | None:
    """A prepared forward pass, see `cpu.prepare`; None where some operands must be copied first."""
    x, A, B, router_weight, _, _, base, _ = operands
    if refuses(x, B.shape[0], settings.mixture):
        return None
    if not all(t is None or t.is_contiguous() for t in (A, B, router_weight)):
        return None
    if any(with_neighbouring_columns(t) is not t for t in (x, base)):
        return None
    device, layout = x.device.index, Layout.of(operands, settings)
    M, O = x.shape[0], B.shape[0]
    ld_y = _distance(base) if inplace else O if M > 1 else divide_up(O, 8) * 8
    run = _passes.forward_of(layout, device, _distance(x), _distance(base), ld_y)

    def prepared(plain: PlainOperands) -> Outputs:
        operands = ForwardOperands._make(plain)
        x, base = operands.x, operands.base
        y = base if inplace and base is not None else x.new_empty(shape)
        return y, *_on_stream(run, device, operands, y)

    return prepared


def prepare_backward(operands: ForwardOperands, settings: Settings, shape: tuple[int, ...]) -> BackwardPass:
    """A prepared backward pass, see `cpu.prepare_backward`."""
    device, layout = operands.x.device.index, Layout.of(operands, settings)
    ld_x, ld_dy = _distance(operands.x), (operands.B.shape[0], 1)
    runs: dict[Needs, _Backward] = {}

    def prepared(operands: BackwardOperands, needs: Needs) -> Gradients:
        if not any(needs):
            return Gradients(*(None,) * len(needs))
        run = runs.get(needs)
        if run is None:
            run = runs[needs] = _passes.backward_of(layout, device, ld_x, ld_dy, needs)
        if operands.dgates is not None:
            operands = operands._replace(dgates=operands.dgates.float().contiguous())
        return _on_stream(run, device, operands)

    return prepared
