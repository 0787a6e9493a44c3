"""Shared memory: what a device gives a block, and what the launches of a plan ask for.

The bytes are read from the native code, which goes through a plan's launches without starting them: nothing is computed here.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import ModuleType

from rode_kernels.backends.gpu.plans import BackwardPlan, Plan, ProblemShape

_DTYPE_OF_SIZE = {4: 1, 2: 3}  # as in csrc/problem.h; float16 takes what bfloat16 takes


@dataclass(frozen=True)
class SharedMemory:
    """The limit that a device's plans have to fit.

    Attributes:
        native: `_cuda` or `_cuda_emulated`: the kernels that are asked.
        limit: the most bytes that a block may ask for.
    """

    native: ModuleType
    limit: int

    def asked(self, shape: ProblemShape, plan: Plan | BackwardPlan) -> int:
        """The most bytes that a launch of this plan asks for."""
        native = self.native
        ask = native.forward_shared_bytes if isinstance(plan, Plan) else native.backward_shared_bytes
        asked: int = ask(
            dtype=_DTYPE_OF_SIZE[shape.element_size],
            tokens=shape.tokens,
            in_features=shape.in_features,
            out_features=shape.out_features,
            total_rank=shape.total_rank,
            experts=shape.experts,
            routed=shape.routed,
            dropout=shape.dropout,
            masks=shape.masks,
            **asdict(plan),
        )
        return asked

    def fits(self, shape: ProblemShape, plan: Plan | BackwardPlan) -> bool:
        return self.asked(shape, plan) <= self.limit
