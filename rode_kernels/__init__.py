"""Fused kernels for mixtures of LoRA experts with different ranks and rectified gates (RoDE, arXiv 2407.12730)."""

from __future__ import annotations

from rode_kernels.backends.registry import BackendStatus, backends
from rode_kernels.functional import gated_mixture, rectified_mixture
from rode_kernels.linear import rectified_linear
from rode_kernels.linears import AdaptedLinear, rectified_linears
from rode_kernels.module import RectifiedMixture

__all__ = [
    "AdaptedLinear",
    "BackendStatus",
    "RectifiedMixture",
    "backends",
    "gated_mixture",
    "rectified_linear",
    "rectified_linears",
    "rectified_mixture",
]
