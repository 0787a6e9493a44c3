"""The passes of a call as functions, and what autograd keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rode_kernels.operands import BackwardOperands, Gradients

Needs = tuple[bool, ...]
"""Which gradients are wanted: six bools in the order of `Gradients`."""

PlainOperands = tuple[
    Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None
]
"""`ForwardOperands`, or a plain tuple of the same tensors, which is made and taken apart faster."""

Outputs = tuple[Tensor, Tensor, Tensor]
"""y, u and g of a forward call."""

ForwardPass = Callable[[PlainOperands], Outputs]
BackwardPass = Callable[[BackwardOperands, Needs], Gradients]

StaticArguments = tuple[Sequence[int], Sequence[float], float, bool, str]
"""The operator's arguments after the operands: ranks, scaling, dropout_p, dense, and the backend's name or ""."""


class Call(NamedTuple):
    """A call that autograd records, besides its operands.

    Attributes:
        run: the forward pass.
        static: the operator's other arguments.
        inplace: y is base, which `run` writes.
        only_y: y is the only output. Autograd takes 1.2 us to make u and g outputs.
        prepared: what the fast path keeps for the backward pass; its type is the fast path's own.
    """

    run: ForwardPass
    static: StaticArguments
    inplace: bool = False
    only_y: bool = False
    prepared: Any = None
