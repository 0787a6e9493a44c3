"""The Triton backend: NVIDIA GPUs without the CUDA kernels, AMD GPUs, and, where TRITON_INTERPRET=1, the CPU, for tests.

Triton is imported at the first call that wants it: it is large, and not a dependency of this package.
"""

from __future__ import annotations

import importlib.util
import os
from functools import lru_cache

import torch

from rode_kernels.gpu import beyond_kernels

refuses = beyond_kernels


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
        return True, f"Triton {triton.__version__}, interpreted (TRITON_INTERPRET=1); for tests"
    if not torch.cuda.is_available():
        return False, f"this torch sees no GPU (Triton {triton.__version__} is installed)"
    return True, f"Triton {triton.__version__}"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: decided by the environment when Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def devices() -> tuple[str, ...]:
    """Torch device types that it serves."""
    return ("cuda", "cpu") if interpreted() else ("cuda",)


def forward(x, *args):
    """As `reference.forward`."""
    from rode_kernels.triton import launch

    with torch.cuda.device_of(x):  # Triton launches on the current device
        return launch.forward(x, *args)


def backward(dy, dgates, x, *args):
    """As `reference.backward`."""
    from rode_kernels.triton import launch

    with torch.cuda.device_of(x):
        return launch.backward(dy, dgates, x, *args)
