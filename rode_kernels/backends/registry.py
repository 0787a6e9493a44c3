"""The choice of a call's backend, and the reasons against the others.

Every backend is a module with the functions of `Backend`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from rode_kernels.backends import cpu, reference
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.triton import backend as triton
from rode_kernels.backends.triton.device import devices as triton_devices
from rode_kernels.mixture import Mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs


class Backend(Protocol):
    """The functions of a backend, which is a module."""

    def status(self) -> tuple[bool, str]:
        """Whether it can run here, and why not or with what."""

    def refuses(self, x: Tensor, out_features: int, mixture: Mixture) -> str:
        """Why it has no kernels for a problem, "" if it has."""

    def forward(self, operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
        """The forward pass, see `reference.forward`."""

    def backward(self, operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
        """The backward pass, see `reference.backward`."""

    def forward_siblings(
        self, operands: Sequence[ForwardOperands], settings: Sequence[Settings]
    ) -> list[Outputs] | None:
        """The forward passes of mixtures that read the same x, in place where there is a base; None where it has no joint pass
        for them, or one that is no better than one call after the other."""

    def backward_siblings(
        self, operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
    ) -> list[Gradients] | None:
        """The backward passes, see `reference.backward_siblings`; None as above."""


# and the devices they serve; none named means any
_BACKENDS: dict[str, tuple[Backend, tuple[str, ...]]] = {
    "reference": (reference, ()),
    "cpu": (cpu, ("cpu",)),
    "cuda": (cuda, ("cuda",)),
    "triton": (triton, triton_devices()),
    "cuda-emulated": (cuda_emulated, ("cpu",)),
}

_BEST: dict[str, tuple[Backend, ...]] = {"cpu": (cpu,), "cuda": (cuda, triton)}  # for each device, in order


@dataclass(frozen=True)
class BackendStatus:
    """One row of `backends()`.

    Attributes:
        name: what `backend=` and RODE_BACKEND take.
        available: whether calls can run on it here.
        devices: torch device types it serves; empty means any.
        reason: what it runs with, or why it cannot.
    """

    name: str
    available: bool
    devices: tuple[str, ...]
    reason: str


def backends() -> dict[str, BackendStatus]:
    """Backends by name: whether each is available in this process, and why not."""
    rows = {}
    for name, (module, devices) in _BACKENDS.items():
        available, why = module.status()
        rows[name] = BackendStatus(name, available, devices, why)
    return rows


@lru_cache
def _say_slow(why: str) -> None:
    warnings.warn(
        f"rode_kernels: {why}; using the slower 'reference' backend (see python -m rode_kernels)",
        RuntimeWarning,
        stacklevel=4,
    )


_NAME = getattr(os.environ, "encodekey", str)("RODE_BACKEND")


def backend_of_environment() -> str:
    """RODE_BACKEND, "" for none. Where it is unset `os.environ.get` takes 0.7 us, for a key to encode and an error to catch; the
    dictionary inside knows as well, in 0.1."""
    encoded = getattr(os.environ, "_data", None)
    return "" if encoded is not None and _NAME not in encoded else os.environ.get("RODE_BACKEND", "")


def select_backend(name: str, x: Tensor, out_features: int, mixture: Mixture) -> Backend:
    """The module that serves a call.

    Args:
        name: the call's `backend`, "" for none; then RODE_BACKEND counts, then what is best for x's device. A problem that this
            one has no kernels for goes to 'reference', with one warning that says why.
        x, out_features, mixture: the problem.

    Raises:
        ValueError: for a named backend that does not exist, is not available here, or does not serve this device or problem.
    """
    origin = "backend"
    if not name:
        name, origin = backend_of_environment(), "RODE_BACKEND"
    if name:
        module = _named(name, origin, x.device.type)
        why = module.refuses(x, out_features, mixture)
        if why:
            raise ValueError(
                f"{origin}={name!r}: {why}; leave the choice of a backend open, or name 'reference'"
            )
        return module
    why = f"this build has no kernels for {x.device.type} tensors"
    for module in _BEST.get(x.device.type, ()):
        available, why = module.status()
        if available:
            why = module.refuses(x, out_features, mixture)
            if not why:
                return module
    _say_slow(why)
    return reference


def _named(name: str, origin: str, device_type: str) -> Backend:
    if name not in _BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(_BACKENDS)}, got {name!r}")
    module, devices = _BACKENDS[name]
    available, why = module.status()
    if not available:
        raise ValueError(f"{origin}={name!r} is not available here: {why}")
    if devices and device_type not in devices:
        raise ValueError(f"{origin}={name!r} serves {', '.join(devices)} tensors, got x on {device_type}")
    return module
