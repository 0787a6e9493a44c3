"""The CUDA kernels on CPU tensors, run by the emulator that tests and traffic counts use: see docs/emulator.md. Very slow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rode_kernels.cuda import Kernels, call
from rode_kernels.gpu import beyond_kernels
from rode_kernels.plan import BackwardPlan, Plan, plan_backward, plan_forward

try:
    import rode_kernels._cuda_emulated as native
except ImportError as error:
    native = None
    _why_not = str(error)


def status() -> tuple[bool, str]:
    """Whether the emulator was built."""
    if native is None:
        return False, f"built without RODE_EMULATE=1 ({_why_not})"
    return True, "the CUDA kernels on the host, every access checked; for tests"


@dataclass
class Machine:
    """What the emulator pretends to be.

    Attributes:
        seed: decides the order of blocks, warps and lanes.
        multiprocessors: as few as let small problems fill the device.
        plan: forces the kernels, instead of `plan_forward`.
    """

    seed: int = 0
    multiprocessors: int = 2
    plan: Plan | None = None
    backward_plan: BackwardPlan | None = None


machine = Machine()


class _EmulatedKernels(Kernels):
    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that the kernels must not read before they write it, and whose garbage shows where they never do."""
        t = super().empty(*shape, like=like, dtype=dtype)
        native.undefined(t.data_ptr(), t.nbytes)
        return t


_kernels = _EmulatedKernels(native)


def forward(x, A, B, router_weight, router_bias, gates, base, seed, mixture, dropout_p, dense, inplace):
    """As `reference.forward`. Counts and what is known about memory begin anew with each call."""
    native.reset(machine.seed)
    plan = machine.plan or plan_forward(call(x, B, router_weight, mixture), machine.multiprocessors)
    args = (x, A, B, router_weight, router_bias, gates, base, seed, mixture, dropout_p, dense, inplace)
    return _kernels.forward(*args, plan=plan, device=0, stream=0)


def backward(dy, dgates, x, u, g, A, B, router_weight, seed, mixture, dropout_p, dense, needs):
    """As `reference.backward`; as `forward` above."""
    native.reset(machine.seed)
    plan = machine.backward_plan or plan_backward(call(x, B, router_weight, mixture), machine.multiprocessors)
    args = (dy, dgates, x, u, g, A, B, router_weight, seed, mixture, dropout_p, dense, needs)
    return _kernels.backward(*args, plan=plan, device=0, stream=0)


refuses = beyond_kernels
