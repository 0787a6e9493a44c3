"""The CUDA backend: its kernels (`csrc/cuda`) on torch's current stream, or products of PyTorch's library where
those are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rode_kernels.backends.cuda.prepared import Between, Kernels
from rode_kernels.backends.gpu import gemm_path as library
from rode_kernels.backends.gpu.layout import Layout, beyond_kernels, with_neighbouring_columns
from rode_kernels.backends.gpu.planner import by_library, plan_backward, plan_forward
from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape, divide_up
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.mixture import Mixture

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
    torch.cuda.current_blas_handle()  # for products of the library
    memory = SharedMemory(_native, _native.max_shared(device))
    return torch.cuda.get_device_properties(device).multi_processor_count, memory


def _distance(t: Tensor | None) -> int:
    """Elements from row to row of a matrix; of one row, which has none, as many as allow wide copies."""
    if t is None:
        return 0
    return t.stride(0) if t.shape[0] > 1 else divide_up(t.shape[1], 8) * 8


class Passes:
    """Both passes of every layout on one kind of device: which kernels, or the library, made once."""

    def __init__(self, kernels: Kernels):
        self.kernels = kernels
        self.between = lru_cache(maxsize=4096)(Between)

    def plan_forward(self, of: ProblemShape, device: int) -> Plan:
        return plan_forward(of, *_prepare(device))

    def plan_backward(self, of: ProblemShape, device: int) -> BackwardPlan:
        return plan_backward(of, *_prepare(device))

    def by_library(self, layout: Layout, backward: bool = False) -> bool:
        return by_library(layout.call, backward)

    def forward_of(self, layout: Layout, device: int, ld_x: int, ld_base: int, ld_y: int) -> Callable:
        """`cuda_kernels.Forward`, or the library's, for a layout and these distances of rows."""
        plan = self.plan_forward(layout.call, device)  # prepares the device, too
        if self.by_library(layout):
            return library.Forward(self.between(self.kernels, layout, device), layout)
        return self.kernels.forward(layout, plan, device, ld_x, ld_base, ld_y)

    def backward_of(
        self, layout: Layout, device: int, ld_x: int, ld_dy: tuple[int, int] | None, needs: tuple[bool, ...]
    ) -> Callable:
        """`cuda_kernels.Backward`, or the library's; no ld_dy: there is no dy."""
        plan = self.plan_backward(layout.call, device)
        plain = ld_dy is None or (ld_dy[1] == 1 and ld_dy[0] >= layout.out_features)  # others it would copy
        if plain and self.by_library(layout, backward=True):
            return library.Backward(self.between(self.kernels, layout, device), layout, needs)
        return self.kernels.backward(layout, plan, device, ld_x, ld_dy or (0, 0), needs)

    def forward(
        self,
        device: int,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        router_weight: Tensor | None,
        router_bias: Tensor | None,
        gates: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        mixture: Mixture,
        dropout_p: float,
        dense: bool,
        inplace: bool,
        stream: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `reference.forward`."""
        x = with_neighbouring_columns(x)
        into = base if inplace else None
        base = None if base is None else with_neighbouring_columns(base)
        y = base if inplace else self.kernels.empty(x.shape[0], B.shape[0], like=x)
        A, B, router_weight = _contiguous(A, B, router_weight)
        router_bias = None if router_bias is None else router_bias.float().contiguous()
        gates = None if gates is None else gates.contiguous()
        layout = Layout.of(x, A, B, router_weight, mixture, dropout_p, dense)
        run = self.forward_of(layout, device, *map(_distance, (x, base, y)))
        u, g = run(x, A, B, router_weight, router_bias, gates, base, y, seed, stream)
        if into is not None and into is not base:  # its columns were not neighbours
            into.copy_(y)
            y = into
        return y, u, g

    def backward(
        self,
        device: int,
        dy: Tensor | None,
        dgates: Tensor | None,
        x: Tensor,
        u: Tensor,
        g: Tensor,
        A: Tensor,
        B: Tensor,
        router_weight: Tensor | None,
        seed: Tensor | None,
        mixture: Mixture,
        dropout_p: float,
        dense: bool,
        needs: tuple[bool, ...],
        stream: int,
    ) -> list[Tensor | None]:
        """As `reference.backward`."""
        if x.shape[0] == 0 or not any(needs):
            (M, K), (O, R), N = x.shape, B.shape, mixture.num_experts
            shapes = ((M, K), (R, K), (O, R), (N, K), (N,), (M, N))
            likes = (x, A, B, router_weight, g, g)
            return [
                like.new_zeros(shape) if needed else None
                for needed, like, shape in zip(needs, likes, shapes, strict=True)
            ]
        x = with_neighbouring_columns(x)
        A, B, router_weight = _contiguous(A, B, router_weight)
        dgates = None if dgates is None else dgates.contiguous()
        if dy is not None and dy.stride() == (0, 0):  # of a sum: a row of it can be copied 16 bytes at a time
            dy = dy[:1].contiguous().expand(dy.shape)
        layout = Layout.of(x, A, B, router_weight, mixture, dropout_p, dense)
        ld_dy = None if dy is None else dy.stride()
        run = self.backward_of(layout, device, _distance(x), ld_dy, needs)
        return run(dy, dgates, x, u, g, A, B, router_weight, seed, stream)


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


_passes = Passes(Kernels(_native))


# What current_stream() finds, without an object for it. Not public, but what compiled graphs use.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def _on_stream(run: Callable, device: int, *args):
    """run(*args, stream): with the device made current, for the native runtime does, and given back."""
    if torch.cuda.current_device() != device:
        with torch.cuda.device(device):
            return _on_stream(run, device, *args)
    stream = _raw_stream(device) if _raw_stream else torch.cuda.current_stream(device).cuda_stream
    return run(*args, stream)


def forward(x, *args):
    """As `reference.forward`; closed experts are skipped by tile."""
    device = x.device.index
    return _on_stream(_passes.forward, device, device, x, *args)


def backward(dy, dgates, x, *args):
    """As `reference.backward`; closed experts are skipped by tile."""
    device = x.device.index
    return _on_stream(_passes.backward, device, device, dy, dgates, x, *args)


def prepare(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    base: Tensor | None,
    mixture: Mixture,
    dropout_p: float,
    inplace: bool,
    shape: tuple[int, ...],
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """`forward` with a router, decided for tensors of these sizes, strides and dtypes; None where some must be copied first.

    Returns:
        A function of the operator's tensors. Its x and base need not be flat, its bias is contiguous and float32; it gives y in
        `shape`.
    """
    if refuses(x, B.shape[0], mixture) or not all(t.is_contiguous() for t in (A, B, router_weight)):
        return None
    if any(t is not None and with_neighbouring_columns(t) is not t for t in (x, base)):
        return None
    device, layout = x.device.index, Layout.of(x, A, B, router_weight, mixture, dropout_p, False)
    M, O = x.shape[0], B.shape[0]
    ld_y = _distance(base) if inplace else O if M > 1 else divide_up(O, 8) * 8
    run = _passes.forward_of(layout, device, _distance(x), _distance(base), ld_y)

    def prepared(x, A, B, router_weight, router_bias, _gates, base, seed):
        y = base if inplace else x.new_empty(shape)
        return y, *_on_stream(run, device, x, A, B, router_weight, router_bias, None, base, y, seed)

    return prepared


def prepare_backward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    mixture: Mixture,
    dropout_p: float,
    shape: tuple[int, ...],
) -> Callable[..., list[Tensor | None]]:
    """`backward` of what `prepare` prepares, of a contiguous dy. `shape`: x's, before it was made flat.

    Returns:
        A function of dy, dgates or None, and of what was saved: x, u, g, A, B, router_weight, seed; and of `needs`. It gives what
        `backward` gives, dx in `shape`.
    """
    device, layout = x.device.index, Layout.of(x, A, B, router_weight, mixture, dropout_p, False)
    ld_x, ld_dy = _distance(x), (B.shape[0], 1)
    runs: dict[tuple[bool, ...], Callable] = {}  # by needs

    def prepared(dy, dgates, x, u, g, A, B, router_weight, seed, needs):
        if not any(needs):
            return [None] * len(needs)
        run = runs.get(needs)
        if run is None:
            run = runs[needs] = _passes.backward_of(layout, device, ld_x, ld_dy, needs)
        if dgates is not None:
            dgates = dgates.float().contiguous()
        return _on_stream(run, device, dy, dgates, x, u, g, A, B, router_weight, seed)

    return prepared
