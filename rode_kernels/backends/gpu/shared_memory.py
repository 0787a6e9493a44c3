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

    def asked(self, call: ProblemShape, plan: Plan | BackwardPlan) -> int:
        """The most bytes that a launch of this plan asks for."""
        native = self.native
        ask = native.forward_shared_bytes if isinstance(plan, Plan) else native.backward_shared_bytes
        asked: int = ask(
            dtype=_DTYPE_OF_SIZE[call.element_size],
            tokens=call.tokens,
            in_features=call.in_features,
            out_features=call.out_features,
            total_rank=call.total_rank,
            experts=call.experts,
            routed=call.routed,
            dropout=call.dropout,
            **asdict(plan),
        )
        return asked

    def fits(self, call: ProblemShape, plan: Plan | BackwardPlan) -> bool:
        return self.asked(call, plan) <= self.limit
