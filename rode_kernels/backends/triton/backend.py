"""The Triton backend: NVIDIA GPUs without the CUDA kernels, AMD GPUs, and, where TRITON_INTERPRET=1, the CPU, for tests.

Triton is imported at the first call that wants it: it is large, and not a dependency of this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rode_kernels.backends.gpu.layout import Layout, beyond_kernels
from rode_kernels.backends.gpu.planner import prefer_gemm
from rode_kernels.backends.gpu.siblings import apart, say_one_by_one
from rode_kernels.backends.triton.device import devices, interpreted
from rode_kernels.mixture import Mixture
from rode_kernels.operands import AnyOperands, BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs

OLDEST = (8, 0)  # compute capability of NVIDIA GPUs that Triton supports


def refuses(x: Tensor, out_features: int, mixture: Mixture) -> str:
    """Why the kernels cannot serve a call; empty where they can."""
    if x.device.type not in devices():
        return f"Triton, interpreted, serves {', '.join(devices())} tensors"
    if x.device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(x.device)
        if capability < OLDEST:
            return f"Triton takes compute capability {_dotted(OLDEST)} and newer, got {_dotted(capability)}"
    return beyond_kernels(x, out_features, mixture)


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


@lru_cache(maxsize=1)
def status() -> tuple[bool, str]:
    """Whether Triton is here and has something to run on."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed (pip install triton)"
    try:
        import triton

        version = f"Triton {triton.__version__}"  # a folder of that name has none
    except Exception as error:
        return False, f"Triton does not load: {error}"
    if interpreted():
        return True, f"{version}, interpreted on the CPU (TRITON_INTERPRET is set); for tests"
    if not torch.cuda.is_available():
        return False, f"this torch sees no GPU ({version} is installed)"
    return True, version


prefer_gemm_always: bool | None = None  # by tests: whether products are PyTorch's, whatever the shape


def _prefer_gemm(operands: AnyOperands, settings: Settings, backward: bool) -> bool:
    """Whether the gemm path runs a call. It has no dropout: it would need a copy of x."""
    if settings.dropout_p > 0.0 or prefer_gemm_always is not None:
        return bool(prefer_gemm_always) and settings.dropout_p == 0.0
    return prefer_gemm(Layout.of(operands, settings).shape, backward, triton=True)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
    """The forward pass, see `reference.forward`."""
    from rode_kernels.backends.triton import launch_forward, launch_gates

    by_gemm = _prefer_gemm(operands, settings, False)
    with torch.cuda.device_of(operands.x):  # Triton launches on the current device
        run = launch_gates.forward if by_gemm else launch_forward.forward
        return run(operands, settings, inplace)


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The backward pass, see `reference.backward`."""
    from rode_kernels.backends.triton import launch_backward, launch_gates

    dy = operands.dy
    # the gemm path would copy others
    plain = dy is None or (dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1])
    by_gemm = plain and any(needs) and _prefer_gemm(operands, settings, True)
    with torch.cuda.device_of(operands.x):
        run = launch_gates.backward if by_gemm else launch_backward.backward
        return run(operands, settings, needs)


FEW_TOKENS = 64  # so few wait for the host, which launches one by one as often, and packs no parameters


def _way(operands: Sequence[AnyOperands], settings: Sequence[Settings], backward: bool) -> str:
    """How mixtures that read the same x run: on the GEMM path, as one of them alone would, by the kernels, or one by one; says so
    once where they cannot run together."""
    if operands[0].x.shape[0] <= FEW_TOKENS:
        return "one by one"
    by_gemm = any(_prefer_gemm(o, s, backward) for o, s in zip(operands, settings, strict=True))
    why = apart(operands, settings, by_gemm)
    if why:
        say_one_by_one(why)
        return "one by one"
    return "gemm" if by_gemm else "kernels"


def forward_siblings(
    operands: Sequence[ForwardOperands], settings: Sequence[Settings]
) -> list[Outputs] | None:
    """The forward passes of mixtures that read the same x, see `registry.Backend`."""
    from rode_kernels.backends.triton import launch_gates, launch_siblings

    way = _way(operands, settings, False)
    if way == "one by one":
        return None
    with torch.cuda.device_of(operands[0].x):
        run = launch_gates.forward_siblings if way == "gemm" else launch_siblings.forward
        return run(operands, settings)


def backward_siblings(
    operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
) -> list[Gradients] | None:
    """The backward passes of mixtures that read the same x, see `registry.Backend`."""
    from rode_kernels.backends.triton import launch_gates, launch_siblings

    way = _way(operands, settings, True)
    if way == "one by one":
        return None
    with torch.cuda.device_of(operands[0].x):
        run = launch_gates.backward_siblings if way == "gemm" else launch_siblings.backward
        return run(operands, settings, needs)
