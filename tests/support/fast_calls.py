"""Calls of `rectified_mixture` on a CPU, with the fast path and without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from mixture_oracle import random_problem
from rode_kernels import autograd, fast_path, functional, rectified_mixture
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import ForwardOperands


def arguments(tokens: tuple[int, ...] = (1,), **options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Positional arguments and keywords of a call, from `random_problem`."""
    p = random_problem(tokens, **options)
    leading = [p.x, p.A, p.B, p.router_weight, p.router_bias]
    return leading, {"base": p.base, "ranks": p.ranks, "scaling": p.scaling}


def knows(leading: list[Any], options: dict[str, Any], backend: str | None = None) -> bool:
    """Whether such a call was prepared before."""
    operands = ForwardOperands(*leading, None, options["base"], None)
    mixture = make_mixture(options["ranks"], options["scaling"])
    how = (options.get("dropout_p", 0.0), options.get("inplace", False), backend)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_path, "_prepare", lambda *args: None)
        return fast_path.find(operands, mixture, *how) is not None


@contextmanager
def the_long_way() -> Iterator[None]:
    """Within this context every call is checked and dispatched."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (functional, autograd):
            patch.setattr(module, "fast_path", None)
        yield


def call(leading: list[Any], options: dict[str, Any], **changes: Any) -> Tensor | tuple[Tensor, Tensor]:
    return rectified_mixture(*leading, **(options | changes))
