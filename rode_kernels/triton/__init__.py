"""The Triton backend: NVIDIA GPUs without the CUDA kernels, AMD GPUs, and, where TRITON_INTERPRET=1, the CPU, for tests.

Triton is imported at the first call that wants it: it is large, and not a dependency of this package.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch
from torch import Tensor

from rode_kernels.gpu import beyond_kernels
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


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: decided by the environment once, as Triton does when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def devices() -> tuple[str, ...]:
    """Torch device types that it serves. Interpreted kernels leave a GPU's tensors to other backends."""
    return ("cpu",) if interpreted() else ("cuda",)


def forward(x, *args):
    """As `reference.forward`."""
    from rode_kernels.triton import launch_forward

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return launch_forward.forward(x, *args)


def backward(dy, dgates, x, *args):
    """As `reference.backward`."""
    from rode_kernels.triton import launch_backward

    with torch.cuda.device_of(x):
        return launch_backward.backward(dy, dgates, x, *args)
