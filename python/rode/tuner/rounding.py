"""Parameters in the dtype of a layer's input."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rode.tuner.ownership import has_hooks

Adapter = Any  # `rode.tuner.adapter.Adapter`, which imports this file


def operand(p: Tensor, x: Tensor) -> Tensor:
    """p in a dtype that the operation takes beside x: x's own, or float32 with 16-bit x."""
    if p.dtype == x.dtype or (p.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        return p
    return p.to(x.dtype)


class RoundedParameters:
    """An adapter's parameters in the dtype of the layer's input, for as long as they stay what they are.

    The operation rounds float32 parameters beside a 16-bit x, once in each call. A call of one token takes longer for that than for
    its products. Kept only while a model generates, for some optimizers write to parameters without autograd's notice.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Tensor, int, Tensor]] = {}  # parameter, its version, the rounded one

    def of(self, name: str, parameter: Tensor, x: Tensor) -> Tensor:
        """The parameter in x's dtype."""
        if parameter.is_inference() or parameter.device != x.device:  # the first has no version
            return operand(parameter, x)
        kept = self._kept.get(name)
        if (
            kept is None
            or kept[0] is not parameter
            or kept[1] != parameter._version
            or kept[2].dtype != x.dtype
        ):
            kept = self._kept[name] = parameter, parameter._version, parameter.detach().to(x.dtype)
        return kept[2]


@contextmanager
def rounded_parameters(adapters: Iterable[Adapter]) -> Iterator[None]:
    """Within this context adapters keep their parameters rounded. Not those of averaged factors, which are averaged before they are
    rounded, and not those whose parameters a hook brings."""
    keeping = [one for one in adapters if one.config.combine != "factors" and not has_hooks(one)]
    for one in keeping:
        one.rounded = RoundedParameters()
    try:
        yield
    finally:
        for one in keeping:
            one.rounded = None
