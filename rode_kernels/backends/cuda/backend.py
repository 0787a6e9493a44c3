"""The CUDA backend: its kernels (`csrc/cuda`) on torch's current stream, or PyTorch's matrix products where those are faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor

from rode_kernels.backends.cuda.passes import Backward, Passes, row_distance
from rode_kernels.backends.cuda.prepared import Kernels
from rode_kernels.backends.cuda.siblings import SiblingPasses
from rode_kernels.backends.gpu.layout import Layout, beyond_kernels, with_neighbouring_columns
from rode_kernels.backends.gpu.plans import divide_up
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.backends.native import load
from rode_kernels.mixture import Mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import BackwardPass, ForwardPass, Needs, Outputs, PlainOperands

_native, _why_not = load(
    "_cuda", "built without nvcc, or with RODE_CUDA=off; reinstall where nvcc is to get it"
)


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


_passes = Passes(Kernels(_native), _prepare)
_siblings = SiblingPasses(_passes)


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
    ld_y = row_distance(base) if inplace else O if M > 1 else divide_up(O, 8) * 8
    run = _passes.forward_of(layout, device, row_distance(x), row_distance(base), ld_y)

    def prepared(plain: PlainOperands) -> Outputs:
        operands = ForwardOperands._make(plain)
        x, base = operands.x, operands.base
        y = base if inplace and base is not None else x.new_empty(shape)
        return y, *_on_stream(run, device, operands, y)

    return prepared


def prepare_backward(operands: ForwardOperands, settings: Settings, shape: tuple[int, ...]) -> BackwardPass:
    """A prepared backward pass, see `cpu.prepare_backward`."""
    device, layout = operands.x.device.index, Layout.of(operands, settings)
    ld_x, ld_dy = row_distance(operands.x), (operands.B.shape[0], 1)
    runs: dict[Needs, Backward] = {}

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


def forward_siblings(
    operands: Sequence[ForwardOperands], settings: Sequence[Settings]
) -> list[Outputs] | None:
    """The forward passes of mixtures that read the same x, see `registry.Backend`."""
    device = operands[0].x.device.index
    return _on_stream(_siblings.forward, device, operands, settings, device)


def backward_siblings(
    operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
) -> list[Gradients] | None:
    """The backward passes of mixtures that read the same x, see `registry.Backend`."""
    device = operands[0].x.device.index
    return _on_stream(_siblings.backward, device, operands, settings, needs, device)
