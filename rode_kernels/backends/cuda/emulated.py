"""The CUDA kernels on CPU tensors, run by the emulator that tests and traffic counts use: see docs/emulator.md. Very slow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rode_kernels.backends.cuda.passes import Passes
from rode_kernels.backends.cuda.prepared import Kernels
from rode_kernels.backends.cuda.siblings import SiblingPasses
from rode_kernels.backends.gpu.layout import Layout, beyond_kernels
from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.backends.native import load
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings
from rode_kernels.passes import Needs, Outputs

native, _why_not = load("_cuda_emulated", "built without RODE_EMULATE=1")


def status() -> tuple[bool, str]:
    """Whether the emulator was built."""
    return native is not None, _why_not or "the CUDA kernels on the host, every access checked; for tests"


@dataclass
class Machine:
    """The device that the emulator imitates.

    Attributes:
        seed: decides the order of blocks, warps and lanes.
        architecture: compute capability, 80 for 8.0: how much shared memory a block may ask for. This one gives the least there is.
        multiprocessors: as few as let small problems fill the device.
        plan, backward_plan: force the kernels, instead of `plan_forward` and `plan_backward`.
        together: mixtures that read the same x run together even where that is slower.
        gemm_path: whether products are PyTorch's; None: as on a device, but never where a plan is forced.
    """

    seed: int = 0
    architecture: int = 86
    multiprocessors: int = 2
    plan: Plan | None = None
    backward_plan: BackwardPlan | None = None
    gemm_path: bool | None = None
    together: bool = False

    @property
    def memory(self) -> SharedMemory:
        return SharedMemory(native, native.max_shared(self.architecture))


machine = Machine()


class _EmulatedKernels(Kernels):
    def empty(self, *shape: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory that the kernels must not read before they write it, and whose garbage shows where they never do."""
        t = super().empty(*shape, like=like, dtype=dtype)
        native.undefined(t.data_ptr(), t.nbytes)
        return t


class _EmulatedPasses(Passes):
    def plan_forward(self, of: ProblemShape, device: int) -> Plan:
        return machine.plan or super().plan_forward(of, device)

    def plan_backward(self, of: ProblemShape, device: int) -> BackwardPlan:
        return machine.backward_plan or super().plan_backward(of, device)

    def prefer_gemm(self, layout: Layout, backward: bool = False) -> bool:
        if machine.gemm_path is not None:
            return machine.gemm_path
        forced = machine.backward_plan if backward else machine.plan
        return forced is None and super().prefer_gemm(layout, backward)

    def may_multiply(self, layout: Layout) -> bool:
        return machine.gemm_path is not False and super().may_multiply(layout)

    def always_together(self) -> bool:
        return machine.together


_passes = _EmulatedPasses(_EmulatedKernels(native), lambda device: (machine.multiprocessors, machine.memory))
_siblings = SiblingPasses(_passes)


def forward(operands: ForwardOperands, settings: Settings, inplace: bool) -> Outputs:
    """The forward pass, see `reference.forward`. Counts and what is known about memory begin anew with each call."""
    native.reset(machine.seed, machine.architecture)
    return _passes.forward(operands, settings, inplace, 0, 0)


def backward(operands: BackwardOperands, settings: Settings, needs: Needs) -> Gradients:
    """The backward pass, see `reference.backward`. Counts begin anew here too."""
    native.reset(machine.seed, machine.architecture)
    return _passes.backward(operands, settings, needs, 0, 0)


refuses = beyond_kernels


def forward_siblings(
    operands: Sequence[ForwardOperands], settings: Sequence[Settings]
) -> list[Outputs] | None:
    """The forward passes of mixtures that read the same x, see `registry.Backend`. Counts begin anew."""
    native.reset(machine.seed, machine.architecture)
    return _siblings.forward(operands, settings, 0, 0)


def backward_siblings(
    operands: Sequence[BackwardOperands], settings: Sequence[Settings], needs: Sequence[Needs]
) -> list[Gradients] | None:
    """The backward passes of mixtures that read the same x, see `registry.Backend`. Counts begin anew."""
    native.reset(machine.seed, machine.architecture)
    return _siblings.backward(operands, settings, needs, 0, 0)
