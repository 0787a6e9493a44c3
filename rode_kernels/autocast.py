"""Autocast: it casts the arguments of the public functions, as it does for `F.linear`. Inside the operation it is off."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor

from rode_kernels.operands import ForwardOperands, MaybeTensor

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype that autocast casts to on a type of device, None where it is off."""
    if device == "meta" or not torch.is_autocast_enabled(device):  # asking for "meta" is an error
        return None
    return torch.get_autocast_dtype(device)


def autocast_off(device: str) -> AbstractContextManager[object]:
    """A context without autocast on a type of device."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def cast_operands(operands: ForwardOperands, inplace: bool) -> ForwardOperands:
    """The operands as autocast wants them: x and base in its dtype, parameters too unless they are float32.

    A base that is written in place stays what it is, and float64 is left alone.
    """
    x, A, B, router_weight, router_bias, gates, base, seed = operands
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return operands
    if x.dtype != torch.float64:
        x, A, B = x.to(dtype), _cast(A, dtype), _cast(B, dtype)
        router_weight, router_bias = _cast(router_weight, dtype), _cast(router_bias, dtype)
    if base is not None and not inplace:
        base = base.to(x.dtype)
    return ForwardOperands(x, A, B, router_weight, router_bias, gates, base, seed)


def _cast(t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    return t if t is None or t.dtype == torch.float32 else t.to(dtype)


def without_autocast(run: Callable[[*_Arguments], _Result]) -> Callable[[*_Arguments], _Result]:
    """`run` with autocast off on the device of its first tensor: products keep the dtypes of the contract."""

    @wraps(run)
    def wrapped(*args: *_Arguments) -> _Result:
        device = next(t for t in args if isinstance(t, Tensor)).device.type
        if autocast_dtype(device) is None:
            return run(*args)
        with torch.autocast(device, enabled=False):
            return run(*args)

    return wrapped
