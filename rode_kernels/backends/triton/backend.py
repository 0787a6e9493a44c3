"""The Triton backend: NVIDIA GPUs without the CUDA kernels, AMD GPUs, and, where TRITON_INTERPRET=1, the CPU, for tests.

Triton is imported at the first call that wants it: it is large, and not a dependency of this package.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache

import torch
from torch import Tensor

from rode_kernels.backends.gpu.layout import beyond_kernels
from rode_kernels.backends.gpu.planner import by_library
from rode_kernels.backends.gpu.plans import ProblemShape
from rode_kernels.backends.triton.device import devices, interpreted
from rode_kernels.mixture import Mixture

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

        triton.__version__  # noqa: B018  (a folder of that name has none)
    except Exception as error:
        return False, f"Triton does not load: {error}"
    if interpreted():
        return (
            True,
            f"Triton {triton.__version__}, interpreted on the CPU (TRITON_INTERPRET is set); for tests",
        )
    if not torch.cuda.is_available():
        return False, f"this torch sees no GPU (Triton {triton.__version__} is installed)"
    return True, f"Triton {triton.__version__}"


by_library_always: bool | None = None  # by tests: whether products are PyTorch's, whatever the shape


def _by_library(
    x: Tensor, B: Tensor, router_weight: Tensor | None, mixture: Mixture, dropout_p: float, backward: bool
) -> bool:
    """Dropout is for the kernels alone: a library would need a copy of x."""
    if dropout_p > 0.0 or by_library_always is not None:
        return bool(by_library_always) and dropout_p == 0.0
    sizes = (*x.shape, B.shape[0], mixture.total_rank, mixture.num_experts, x.element_size())
    return by_library(ProblemShape(*sizes, routed=router_weight is not None), backward, triton=True)


def forward(x, A, B, router_weight, router_bias, gates, base, seed, mixture, dropout_p, dense, inplace):
    """As `reference.forward`."""
    from rode_kernels.backends.triton import launch_forward
    from rode_kernels.backends.triton import launch_gates as launch_between

    args = (x, A, B, router_weight, router_bias, gates, base)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if _by_library(x, B, router_weight, mixture, dropout_p, False):
            return launch_between.forward(*args, mixture, dense, inplace)
        return launch_forward.forward(*args, seed, mixture, dropout_p, dense, inplace)


def backward(dy, dgates, x, u, g, A, B, router_weight, seed, mixture, dropout_p, dense, needs):
    """As `reference.backward`."""
    from rode_kernels.backends.triton import launch_backward
    from rode_kernels.backends.triton import launch_gates as launch_between

    args = (dy, dgates, x, u, g, A, B, router_weight)
    plain = dy is None or (dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1])  # others a library would copy
    with torch.cuda.device_of(x):
        if plain and any(needs) and _by_library(x, B, router_weight, mixture, dropout_p, True):
            return launch_between.backward(*args, mixture, dense, needs)
        return launch_backward.backward(*args, seed, mixture, dropout_p, dense, needs)
