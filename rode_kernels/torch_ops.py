"""The operators, registered with torch.library: what a call runs where no gradients are recorded.

One operator serves both entry points. `rode::mixture` returns (y, u, g), because only inputs and outputs can be saved for backward.
`rode::mixture_` accumulates into base; `rode::mixture_backward` computes every gradient. Their arguments are the operands, then
the static ones: ranks, scaling, dropout_p, dense and the backend's name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rode_kernels.autocast import without_autocast
from rode_kernels.backends.reference import accumulation_dtype
from rode_kernels.backends.registry import select_backend
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, MaybeTensor, Settings
from rode_kernels.passes import Needs, Outputs, StaticArguments

_STATIC = "int[] ranks, float[] scaling, float dropout_p, bool dense, str backend"
library = torch.library.Library("rode", "DEF")
library.define(
    "mixture(Tensor x, Tensor A, Tensor B, Tensor? router_weight, Tensor? router_bias, Tensor? gates, Tensor? base, "
    f"Tensor? seed, {_STATIC}) -> (Tensor y, Tensor u, Tensor g)"
)
library.define(
    "mixture_(Tensor x, Tensor A, Tensor B, Tensor? router_weight, Tensor? router_bias, Tensor? gates, "
    f"Tensor(a!) base, Tensor? seed, {_STATIC}) -> (Tensor u, Tensor g)"
)
library.define(
    "mixture_backward(Tensor? dy, Tensor? dgates, Tensor x, Tensor u, Tensor g, Tensor A, Tensor B, "
    f"Tensor? router_weight, Tensor? seed, {_STATIC}, bool[] needs) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dWr, Tensor dbr, Tensor dgates)"
)
TENSORS, TENSORS_BACKWARD = len(ForwardOperands._fields), len(BackwardOperands._fields)


def _rows(t: MaybeTensor) -> MaybeTensor:
    """(..., C) as (M, C): a view where strides allow one."""
    if t is None:
        return t
    return t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(0, t.shape[-1])


def _contiguous(t: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    return t if t is None else t.to(dtype).contiguous()


def settings_of(static: StaticArguments) -> Settings:
    """The settings of an operator's call."""
    ranks, scaling, dropout_p, dense, _ = static
    return Settings(make_mixture(tuple(ranks), tuple(scaling)), dropout_p, dense)


def _settings(static: StaticArguments, seed: Tensor | None) -> tuple[Settings, str]:
    """The settings, and the name of the backend. Raises ValueError for dropout without a seed."""
    settings = settings_of(static)
    if settings.dropout_p > 0 and seed is None:
        raise ValueError(f"seed: expected (1,) int64 with dropout_p={settings.dropout_p}, got None")
    return settings, static[-1]


# The operators' own arguments are `Any`: torch.library hands them over in one row, without types.


def _run(args: tuple[Any, ...], inplace: bool) -> Outputs:
    """y (M, O), u and g by the backend. g is never the given gates: an operator's output may not be its input."""
    x, A, B, router_weight, router_bias, gates, base, seed = args[:TENSORS]
    settings, name = _settings(args[TENSORS:], seed)
    backend = select_backend(name, x, B.shape[0], settings.mixture)
    acc_dtype = accumulation_dtype(x.dtype)
    bias, gates = _contiguous(router_bias, acc_dtype), _contiguous(_rows(gates), acc_dtype)
    rows = ForwardOperands(_rows(x), A, B, router_weight, bias, gates, _rows(base), seed)
    y, u, g = backend.forward(rows, settings, inplace)
    return y, u, g.clone() if g is gates else g


def _forward(*args: Any) -> Outputs:
    y, u, g = _run(args, False)
    return y.view(*args[0].shape[:-1], y.shape[-1]), u, g


def _forward_inplace(*args: Any) -> tuple[Tensor, Tensor]:
    y, u, g = _run(args, True)
    base = args[6]
    if y.data_ptr() != base.data_ptr():  # strides that do not flatten, or that the backend does not write to
        base.copy_(y.view(base.shape))
    return u, g


def note_write(base: Tensor) -> None:
    """Tells autograd of a write that it took no part in, so that it notices where the old base was saved."""
    if not base.is_inference():
        torch.autograd.graph.increment_version(base)


def gradients(operands: BackwardOperands, static: StaticArguments, needs: Needs) -> Gradients:
    """Gradients by the backend, without the dispatcher. dx has x's shape."""
    dy, dgates, x, u, g, A, B, router_weight, seed = operands
    settings, name = _settings(static, seed)
    backend = select_backend(name, x, B.shape[0], settings.mixture)
    dgates = _contiguous(dgates, g.dtype)
    rows = BackwardOperands(_rows(dy), dgates, _rows(x), u, g, A, B, router_weight, seed)
    grads = backend.backward(rows, settings, tuple(needs))
    like = (x, A, B, router_weight, None, None)  # the dtype in which each gradient is returned
    dx, *others = (
        grad if grad is None or t is None else grad.to(t.dtype).contiguous()
        for grad, t in zip(grads, like, strict=True)
    )
    return Gradients(None if dx is None else dx.view(x.shape), *others)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    """The operator: an empty tensor for what is not wanted."""
    operands, static, needs = BackwardOperands(*args[:TENSORS_BACKWARD]), args[TENSORS_BACKWARD:-1], args[-1]
    grads = gradients(operands, static, needs)
    return tuple(operands.x.new_empty(0) if t is None else t for t in grads)


def _fake_saved(x: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    tokens = math.prod(x.shape[:-1])  # Size.numel() would fix a dynamic shape
    dtype = accumulation_dtype(x.dtype)
    return x.new_empty(tokens, sum(ranks), dtype=dtype), x.new_empty(tokens, len(ranks), dtype=dtype)


def _fake(*args: Any) -> Outputs:
    x, B, ranks = args[0], args[2], args[TENSORS]
    return x.new_empty(*x.shape[:-1], B.shape[0]), *_fake_saved(x, ranks)


def _fake_inplace(*args: Any) -> tuple[Tensor, Tensor]:
    return _fake_saved(args[0], args[TENSORS])


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    _, _, x, _, g, A, B, router_weight, _, ranks, *_, needs = args
    shaped = (x, A, B, router_weight, g.new_empty(len(ranks)), g)
    return tuple(
        like.new_empty(like.shape) if need else x.new_empty(0)
        for like, need in zip(shaped, needs, strict=True)
    )


for _name, _implementation, _fake_implementation in (
    ("mixture", _forward, _fake),
    ("mixture_", _forward_inplace, _fake_inplace),
    ("mixture_backward", _backward, _fake_backward),
):
    library.impl(_name, without_autocast(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rode::{_name}", _fake_implementation, lib=library)

OP = torch.ops.rode.mixture
OP_INPLACE = torch.ops.rode.mixture_
OP_BACKWARD = torch.ops.rode.mixture_backward
