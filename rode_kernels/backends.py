"""Which backend runs a call, and why the others do not.

Every backend is a module that states the two functions of `rode_kernels.reference`: `forward` and `backward`.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

from rode_kernels import cpu, reference

_MODULES: dict[str, ModuleType] = {"reference": reference, "cpu": cpu}


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
    """What is available in this process, by name, and why the rest is not."""
    native, why = cpu.status()
    return {
        "reference": BackendStatus(
            "reference", True, (), "plain PyTorch; slow and exact, the oracle of the tests"
        ),
        "cpu": BackendStatus("cpu", native, ("cpu",), why),
    }


@lru_cache(maxsize=1)
def _say_slow(device_type: str) -> None:
    why = cpu.status()[1] if device_type == "cpu" else f"this build has no kernels for {device_type} tensors"
    warnings.warn(
        f"rode_kernels: {why}; using the slower 'reference' backend (see python -m rode_kernels)",
        RuntimeWarning,
        stacklevel=3,
    )


def select_backend(name: str, device_type: str) -> ModuleType:
    """The module that serves a call.

    Args:
        name: the call's `backend`, "" for none; then RODE_BACKEND counts, then the device's own.
        device_type: `x.device.type`.

    Raises:
        ValueError: for a name that does not exist, is not available here, or does not serve this device.
    """
    origin = "backend"
    if not name:
        name, origin = os.environ.get("RODE_BACKEND", ""), "RODE_BACKEND"
    if name:
        return _named(name, origin, device_type)
    if device_type == "cpu" and cpu.status()[0]:
        return cpu
    _say_slow(device_type)
    return reference


def _named(name: str, origin: str, device_type: str) -> ModuleType:
    if name not in _MODULES:
        raise ValueError(f"{origin}: expected one of {', '.join(_MODULES)}, got {name!r}")
    status = backends()[name]
    if not status.available:
        raise ValueError(f"{origin}={name!r} is not available here: {status.reason}")
    if status.devices and device_type not in status.devices:
        raise ValueError(
            f"{origin}={name!r} serves {', '.join(status.devices)} tensors, got x on {device_type}"
        )
    return _MODULES[name]
