"""The CUDA backend: its kernels (`csrc/cuda`) on torch's current stream, or PyTorch's matrix products where those are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rode_kernels.backends.cuda.prepared import GateKernel, Kernels
from rode_kernels.backends.gpu import gemm_path
from rode_kernels.backends.gpu.layout import Layout, beyond_kernels, no_gradients, with_neighbouring_columns
from rode_kernels.backends.gpu.planner import plan_backward, plan_forward, prefer_gemm
from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape, divide_up
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.mixture import Mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings

try:
    import rode_kernels._cuda as _native
except ImportError as error:
    _native = None
    _why_not: ImportError | None = error
else:
    _why_not = None


@lru_cache(maxsize=1)
def status() -> tuple[bool, str]:
    """Whether the kernels can run here, and a line that says what they run with or why they cannot."""
    if _native is None:
        if isinstance(_why_not, ModuleNotFoundError):
            return False, "built without nvcc, or with RODE_CUDA=off; reinstall where nvcc is to get it"
        return False, f"the native module does not load: {_why_not}"
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

    def plan_forward(self, of: ProblemShape, device: int) -> Plan:
        return plan_forward(of, *_prepare(device))

    def plan_backward(self, of: ProblemShape, device: int) -> BackwardPlan:
        return plan_backward(of, *_prepare(device))

    def prefer_gemm(self, layout: Layout, backward: bool = False) -> bool:
        return prefer_gemm(layout.problem_shape, backward)

    def forward_of(self, layout: Layout, device: int, ld_x: int, ld_base: int, ld_y: int) -> Callable:
        """The kernels' forward pass, or that of the gemm path, for a layout and these row strides."""
        plan = self.plan_forward(layout.problem_shape, device)  # prepares the device, too
        if self.prefer_gemm(layout):
            return gemm_path.GemmForward(self.gate_kernel(self.kernels, layout, device), layout)
        return self.kernels.forward(layout, plan, device, ld_x, ld_base, ld_y)

    def backward_of(
        self, layout: Layout, device: int, ld_x: int, ld_dy: tuple[int, int] | None, needs: tuple[bool, ...]
    ) -> Callable:
        """The kernels' backward pass, or that of the gemm path. ld_dy is None where there is no dy."""
        plan = self.plan_backward(layout.problem_shape, device)
        plain = ld_dy is None or (ld_dy[1] == 1 and ld_dy[0] >= layout.out_features)  # others it would copy
        if plain and self.prefer_gemm(layout, backward=True):
            return gemm_path.GemmBackward(self.gate_kernel(self.kernels, layout, device), layout, needs)
        return self.kernels.backward(layout, plan, device, ld_x, ld_dy or (0, 0), needs)

    def forward(
        self, operands: ForwardOperands, settings: Settings, inplace: bool, device: int, stream: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The forward pass, see `reference.forward`."""
        x, A, B, router_weight, router_bias, gates, base, seed = operands
        x = with_neighbouring_columns(x)
        into = base if inplace else None
        base = None if base is None else with_neighbouring_columns(base)
        y = base if inplace else self.kernels.empty(x.shape[0], B.shape[0], like=x)
        A, B, router_weight, gates = _contiguous(A, B, router_weight, gates)
        router_bias = None if router_bias is None else router_bias.float().contiguous()
        operands = ForwardOperands(x, A, B, router_weight, router_bias, gates, base, seed)
        run = self.forward_of(Layout.of(operands, settings), device, *map(_distance, (x, base, y)))
        u, g = run(operands, y, stream)
        if into is not None and into is not base:  # its columns were not neighbours
            into.copy_(y)
            y = into
        return y, u, g

    def backward(
        self,
        operands: BackwardOperands,
        settings: Settings,
        needs: tuple[bool, ...],
        device: int,
        stream: int,
    ) -> Gradients:
        """The backward pass, see `reference.backward`."""
        dy, dgates, x, u, g, A, B, router_weight, seed = operands
        if x.shape[0] == 0 or not any(needs):
            return no_gradients(operands, needs)
        x = with_neighbouring_columns(x)
        A, B, router_weight, dgates = _contiguous(A, B, router_weight, dgates)
        if dy is not None and dy.stride() == (0, 0):  # of a sum: a row of it can be copied 16 bytes at a time
            dy = dy[:1].contiguous().expand(dy.shape)
        operands = BackwardOperands(dy, dgates, x, u, g, A, B, router_weight, seed)
        ld_dy = None if dy is None else dy.stride()
        run = self.backward_of(Layout.of(operands, settings), device, _distance(x), ld_dy, needs)
        return run(operands, stream)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


_passes = Passes(Kernels(_native))


# Gives the address of the stream that current_stream() would make an object for. It is not public, but compiled graphs use it.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _on_stream(run: Callable, device: int, *args):
    """run(*args, stream): with the device made current, for the native runtime does, and given back."""
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _on_stream(run, device, *args)
    stream = _raw_stream(device) if _raw_stream else torch.cuda.current_stream(device).cuda_stream
    return run(*args, stream)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, see `reference.forward`; closed experts are skipped by tile."""
    device = operands.x.device.index
    return _on_stream(_passes.forward, device, operands, settings, inplace, device)


def backward(operands: BackwardOperands, settings: Settings, needs: tuple[bool, ...]) -> Gradients:
    """The backward pass, see `reference.backward`; closed experts are skipped by tile."""
    device = operands.x.device.index
    return _on_stream(_passes.backward, device, operands, settings, needs, device)


def prepare(
    operands: ForwardOperands, settings: Settings, inplace: bool, shape: tuple[int, ...]
) -> Callable[[tuple], tuple[Tensor, Tensor, Tensor]] | None:
    """A prepared forward pass, see `cpu.prepare`; None where some operands must be copied first."""
    x, A, B, router_weight, _, _, base, _ = operands
    if refuses(x, B.shape[0], settings.mixture) or not all(t.is_contiguous() for t in (A, B, router_weight)):
        return None
    if any(t is not None and with_neighbouring_columns(t) is not t for t in (x, base)):
        return None
    device, layout = x.device.index, Layout.of(operands, settings)
    M, O = x.shape[0], B.shape[0]
    ld_y = _distance(base) if inplace else O if M > 1 else divide_up(O, 8) * 8
    run = _passes.forward_of(layout, device, _distance(x), _distance(base), ld_y)

    def prepared(operands: tuple) -> tuple[Tensor, Tensor, Tensor]:
        operands = ForwardOperands._make(operands)
        y = operands.base if inplace else operands.x.new_empty(shape)
        return y, *_on_stream(run, device, operands, y)

    return prepared


def prepare_backward(
    operands: ForwardOperands, settings: Settings, shape: tuple[int, ...]
) -> Callable[[BackwardOperands, tuple[bool, ...]], Gradients]:
    """A prepared backward pass, see `cpu.prepare_backward`."""
    device, layout = operands.x.device.index, Layout.of(operands, settings)
    ld_x, ld_dy = _distance(operands.x), (operands.B.shape[0], 1)
    runs: dict[tuple[bool, ...], Callable] = {}  # by needs

    def prepared(operands: BackwardOperands, needs: tuple[bool, ...]) -> Gradients:
        if not any(needs):
            return Gradients(*(None,) * len(needs))
        run = runs.get(needs)
        if run is None:
            run = runs[needs] = _passes.backward_of(layout, device, ld_x, ld_dy, needs)
        if operands.dgates is not None:
            operands = operands._replace(dgates=operands.dgates.float().contiguous())
        return _on_stream(run, device, operands)

    return prepared
