"""The operators, registered with torch.library: what a call runs where no gradients are recorded.

One operator serves both entry points: `rode::mixture` returns (y, u, g), for backward may save only inputs and outputs.
`rode::mixture_` accumulates into base; `rode::mixture_backward` is every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from rode_kernels.backends.reference import accumulation_dtype
from rode_kernels.backends.registry import select_backend
from rode_kernels.mixture import make_mixture

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


def _rows(t: Tensor | None) -> Tensor | None:
    """(..., C) as (M, C): a view where strides allow one."""
    return None if t is None else t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(0, t.shape[-1])


def _wide_gates(gates: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gates is None else _rows(gates).to(accumulation_dtype(x.dtype))


def autocast_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # asking for "meta" is an error


def _without_autocast(run: Callable) -> Callable:
    """Autocast has acted on the public function's arguments; inside, products keep the dtypes of the contract."""

    @wraps(run)
    def wrapped(*args):
        x = next(t for t in args if isinstance(t, Tensor))
        if not autocast_enabled(x.device.type):
            return run(*args)
        with torch.autocast(x.device.type, enabled=False):
            return run(*args)

    return wrapped


def _forward(
    x, A, B, router_weight, router_bias, gates, base, seed, ranks, scaling, dropout_p, dense, backend
):
    mixture = make_mixture(tuple(ranks), tuple(scaling))
    run = select_backend(backend, x, B.shape[0], mixture)
    gates = _wide_gates(gates, x)
    y, u, g = run.forward(
        _rows(x), A, B, router_weight, router_bias, gates, _rows(base), seed, mixture, dropout_p, dense, False
    )
    if g is gates:  # an operator's output may not be its input
        g = g.clone()
    return y.view(*x.shape[:-1], B.shape[0]), u, g


def _forward_inplace(
    x, A, B, router_weight, router_bias, gates, base, seed, ranks, scaling, dropout_p, dense, backend
):
    mixture = make_mixture(tuple(ranks), tuple(scaling))
    run = select_backend(backend, x, B.shape[0], mixture)
    gates, rows = _wide_gates(gates, x), _rows(base)
    _, u, g = run.forward(
        _rows(x), A, B, router_weight, router_bias, gates, rows, seed, mixture, dropout_p, dense, True
    )
    if rows.data_ptr() != base.data_ptr():  # strides that do not flatten: the sum went into a copy
        base.copy_(rows.view(base.shape))
    return u, g.clone() if g is gates else g


def all_gradients(
    dy, dgates, x, u, g, A, B, router_weight, seed, ranks, scaling, dropout_p, dense, backend, needs
) -> list[Tensor | None]:
    """Of x, A, B, router_weight, router_bias and the gates; None where nobody asks."""
    mixture = make_mixture(tuple(ranks), tuple(scaling))
    run = select_backend(backend, x, B.shape[0], mixture)
    grads = run.backward(
        _rows(dy), dgates, _rows(x), u, g, A, B, router_weight, seed, mixture, dropout_p, dense, tuple(needs)
    )
    like = (x, A, B, router_weight, None, None)  # the dtype in which each gradient is returned
    grads = [
        grad if grad is None or t is None else grad.to(t.dtype).contiguous()
        for grad, t in zip(grads, like, strict=True)
    ]
    if needs[0]:
        grads[0] = grads[0].view(x.shape)
    return grads


def _backward(dy, dgates, x, *others):
    """The operator: what nobody asks for is an empty tensor."""
    return tuple(x.new_empty(0) if t is None else t for t in all_gradients(dy, dgates, x, *others))


def _fake(x, A, B, router_weight, router_bias, gates, base, seed, ranks, scaling, dropout_p, dense, backend):
    u, g = _fake_saved(x, ranks)
    return x.new_empty(*x.shape[:-1], B.shape[0]), u, g


def _fake_inplace(
    x, A, B, router_weight, router_bias, gates, base, seed, ranks, scaling, dropout_p, dense, backend
):
    return _fake_saved(x, ranks)


def _fake_saved(x: Tensor, ranks: Sequence[int]) -> tuple[Tensor, Tensor]:
    tokens, wide = (
        math.prod(x.shape[:-1]),
        accumulation_dtype(x.dtype),
    )  # Size.numel() would fix a dynamic shape
    return x.new_empty(tokens, sum(ranks), dtype=wide), x.new_empty(tokens, len(ranks), dtype=wide)


def _fake_backward(
    dy, dgates, x, u, g, A, B, router_weight, seed, ranks, scaling, dropout_p, dense, backend, needs
):
    need_x, need_A, need_B, need_router, need_bias, need_gates = needs
    nothing = (0,)
    return (
        x.new_empty(x.shape if need_x else nothing),
        A.new_empty(A.shape) if need_A else x.new_empty(nothing),
        B.new_empty(B.shape) if need_B else x.new_empty(nothing),
        router_weight.new_empty(router_weight.shape) if need_router else x.new_empty(nothing),
        g.new_empty(len(ranks)) if need_bias else x.new_empty(nothing),
        g.new_empty(g.shape) if need_gates else x.new_empty(nothing),
    )


for _name, _implementation, _fake_implementation in (
    ("mixture", _forward, _fake),
    ("mixture_", _forward_inplace, _fake_inplace),
    ("mixture_backward", _backward, _fake_backward),
):
    library.impl(_name, _without_autocast(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rode::{_name}", _fake_implementation, lib=library)

OP, OP_INPLACE, OP_BACKWARD = (
    torch.ops.rode.mixture,
    torch.ops.rode.mixture_,
    torch.ops.rode.mixture_backward,
)
TENSORS = 8  # of the operator's arguments, the first that are tensors
