"""Properties of the device that tensors are on, for the host side of the Triton kernels."""

from __future__ import annotations

import os
from functools import lru_cache

import torch
from torch import Tensor

from rode_kernels.backends.gpu.layout import tf32_allowed

INTERPRETED_MULTIPROCESSORS = 2  # as few as let small problems fill the device


@lru_cache(maxsize=1)
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: decided by the environment once, as Triton does when kernels are defined."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def devices() -> tuple[str, ...]:
    """Torch device types that it serves. Interpreted kernels leave a GPU's tensors to other backends."""
    return ("cpu",) if interpreted() else ("cuda",)


def amd() -> bool:
    return torch.version.hip is not None


def multiprocessors(x: Tensor) -> int:
    if x.device.type == "cpu":
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def capturing(x: Tensor) -> bool:
    """Whether a graph is being captured on x's device, where nothing may wait and nothing may be tried."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def precision(x: Tensor) -> str:
    """How float32 products are rounded: "tf32" where torch may and the device can, of AMD's that is gfx942 alone."""
    if x.dtype != torch.float32 or not tf32_allowed():
        return "ieee"
    if amd() and not torch.cuda.get_device_properties(x.device).gcnArchName.startswith("gfx942"):
        return "ieee"
    return "tf32"
