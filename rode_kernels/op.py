"""The public functions, their registration with torch.library, and the autograd Functions.

One operator serves both entry points: `rode::mixture` returns (y, u, g), for backward may save only inputs and outputs.
`rode::mixture_` accumulates into base; `rode::mixture_backward` is every gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import wraps

import torch
from torch import Tensor

from rode_kernels import shortcut
from rode_kernels.backends import select_backend
from rode_kernels.mixture import (
    GATE_GRADS,
    Mixture,
    check_inplace,
    check_inputs,
    check_tensor,
    check_x,
    make_mixture,
    normalize_seed,
)
from rode_kernels.reference import accumulation_dtype

_STATIC = "int[] ranks, float[] scaling, float dropout_p, bool dense, str backend"
_lib = torch.library.Library("rode", "DEF")
_lib.define(
    "mixture(Tensor x, Tensor A, Tensor B, Tensor? router_weight, Tensor? router_bias, Tensor? gates, Tensor? base, "
    f"Tensor? seed, {_STATIC}) -> (Tensor y, Tensor u, Tensor g)"
)
_lib.define(
    "mixture_(Tensor x, Tensor A, Tensor B, Tensor? router_weight, Tensor? router_bias, Tensor? gates, "
    f"Tensor(a!) base, Tensor? seed, {_STATIC}) -> (Tensor u, Tensor g)"
)
_lib.define(
    "mixture_backward(Tensor? dy, Tensor? dgates, Tensor x, Tensor u, Tensor g, Tensor A, Tensor B, "
    f"Tensor? router_weight, Tensor? seed, {_STATIC}, bool[] needs) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dWr, Tensor dbr, Tensor dgates)"
)


def _rows(t: Tensor | None) -> Tensor | None:
    """(..., C) as (M, C): a view where strides allow one."""
    return None if t is None else t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(0, t.shape[-1])


def _wide_gates(gates: Tensor | None, x: Tensor) -> Tensor | None:
    return None if gates is None else _rows(gates).to(accumulation_dtype(x.dtype))


def _autocast_enabled(device: str) -> bool:
    return device != "meta" and torch.is_autocast_enabled(device)  # asking for "meta" is an error


def _without_autocast(run: Callable) -> Callable:
    """Autocast has acted on the public function's arguments; inside, products keep the dtypes of the contract."""

    @wraps(run)
    def wrapped(*args):
        x = next(t for t in args if isinstance(t, Tensor))
        if not _autocast_enabled(x.device.type):
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


def _all_gradients(
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
    return tuple(x.new_empty(0) if t is None else t for t in _all_gradients(dy, dgates, x, *others))


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
    _lib.impl(_name, _without_autocast(_implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rode::{_name}", _fake_implementation, lib=_lib)

_op, _op_inplace, _op_backward = (
    torch.ops.rode.mixture,
    torch.ops.rode.mixture_,
    torch.ops.rode.mixture_backward,
)
_TENSORS = 8  # of the operator's arguments, the first that are tensors


def _below_autograd(op: Callable, static: tuple) -> Callable:
    def run(*tensors):
        with torch._C._AutoDispatchBelowAutograd():
            return op(*tensors, *static)

    return run


def _save(ctx, u: Tensor, g: Tensor, tensors: tuple, static: tuple, known: shortcut.Shortcut | None) -> None:
    """Keeps x, u, g and the parameters themselves: nothing of width O, no copy of x, no mask."""
    x, A, B, router_weight, router_bias, gates, _base, seed = tensors
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, u, g, A, B, router_weight, seed)
    bias_dtype = None if router_bias is None else router_bias.dtype
    ctx.others = static, bias_dtype, None if gates is None else (gates.shape, gates.dtype), known


def _gradients(ctx, dy: Tensor | None, dgates: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of the operator's eight tensor arguments."""
    x, u, g, A, B, router_weight, seed = ctx.saved_tensors
    static, bias_dtype, of_gates, known = ctx.others
    needs = ctx.needs_input_grad[:6]
    tensors = (dy, dgates, x, u, g, A, B, router_weight, seed)
    if not shortcut.unwatched(tensors):
        grads = _op_backward(*tensors, *static, needs)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    elif known is not None and dy is not None and dy.is_contiguous():
        grads = known.backward(*tensors, needs)
    else:
        grads = _all_gradients(*tensors, *static, needs)
    dx, dA, dB, dWr, dbr, dg = grads
    if dbr is not None:
        dbr = dbr.to(bias_dtype)
    if dg is not None:
        shape, dtype = of_gates
        dg = dg.to(dtype).view(shape)
    return dx, dA, dB, dWr, dbr, dg, dy if ctx.needs_input_grad[6] else None, None


class _Mixture(torch.autograd.Function):
    """Of the operator's tensors, what runs it on them, its other arguments, and the shortcut if it goes by one."""

    @staticmethod
    def forward(ctx, *args):
        *tensors, run, static, known = args
        y, u, g = run(*tensors)
        _save(ctx, u, g, tensors, static, known)
        given = tensors[3] is None  # the gates: nobody returns them
        ctx.mark_non_differentiable(*((u, g) if given else (u,)))
        return y, u, g

    @staticmethod
    def backward(ctx, dy, _du, dgates):
        if dy is None and dgates is None:
            return (None,) * (_TENSORS + 3)
        return *_gradients(ctx, dy, dgates), None, None, None


class _MixtureAlone(torch.autograd.Function):
    """`_Mixture` by a shortcut and without gates: what is no output is not made ready for autograd, which takes 1.2 us."""

    @staticmethod
    def forward(ctx, x, A, B, router_weight, router_bias, gates, base, seed, run, static, known):
        y, u, g = run(x, A, B, router_weight, router_bias, gates, base, seed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, u, g, A, B, router_weight, seed)
        ctx.others = static, None if router_bias is None else router_bias.dtype, None, known
        return y

    @staticmethod
    def backward(ctx, dy):
        return _Mixture.backward(ctx, dy, None, None)


class _MixtureInplace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        *tensors, run, static, known = args
        base = tensors[6]
        *_, u, g = run(*tensors)
        ctx.mark_dirty(base)
        ctx.mark_non_differentiable(u)
        _save(ctx, u, g, tensors, static, known)
        return base, u, g

    @staticmethod
    def backward(ctx, dy, du, dgates):
        return _Mixture.backward(ctx, dy, du, dgates)


# Without `Function.apply`'s look for functorch, which takes 2.5 us: for calls of which one knows that it is not there.
_apply, _apply_alone, _apply_inplace = (
    super(torch.autograd.Function, f).apply for f in (_Mixture, _MixtureAlone, _MixtureInplace)
)


class _MixtureBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return _op_backward(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "rode_kernels: double backward is not supported; for second derivatives write the formula in PyTorch, "
            "or call backward with create_graph=False"
        )


def _needs_autograd(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _autograd(*args):
    if _needs_autograd(args):
        tensors, static = args[:_TENSORS], args[_TENSORS:]
        return _Mixture.apply(*tensors, _below_autograd(_op, static), static, None)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(*args)


def _autograd_backward(*args):
    if _needs_autograd(args):
        return _MixtureBackward.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _op_backward(*args)


_lib.impl("mixture", _autograd, "Autograd")
_lib.impl("mixture_backward", _autograd_backward, "Autograd")


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast x, base and parameters that are neither float32 nor of that dtype are cast, as for F.linear."""
    device = x.device.type
    if x.dtype == torch.float64 or not _autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), *(t if t is None or t.dtype == torch.float32 else t.to(dtype) for t in others)


def _written(base: Tensor) -> None:
    """Lets autograd see a write that it took no part in: what was saved of base is no longer what it was."""
    if not base.is_inference():
        torch.autograd.graph.increment_version(base)


def _run(
    x,
    A,
    B,
    router_weight,
    router_bias,
    gates,
    base,
    mixture: Mixture,
    dropout_p,
    seed,
    inplace,
    dense,
    backend,
) -> tuple[Tensor, Tensor]:
    check_x(x)
    x, A, B, router_weight, router_bias = _autocast(x, A, B, router_weight, router_bias)
    if base is not None and not inplace and _autocast_enabled(x.device.type):
        base = base.to(x.dtype)
    check_inputs(mixture, x, A, B, router_weight, router_bias, gates, base, dropout_p)
    if gates is not None:
        gates = gates.expand(*x.shape[:-1], mixture.num_experts)
    seed = normalize_seed(seed, dropout_p, x)
    static = (mixture.ranks, mixture.scaling, float(dropout_p), dense, backend or "")
    if inplace:
        check_inplace(base, x)
    if inplace and not torch.compiler.is_compiling():
        tensors = (x, A, B, router_weight, router_bias, gates, base, seed)
        if _needs_autograd(tensors):
            if base._is_view():  # a Function with several outputs may not write into a view
                y, _, g = _op(*tensors, *static)
                return base.copy_(y), g
            y, _, g = _MixtureInplace.apply(*tensors, _below_autograd(_op_inplace, static), static, None)
            return y, g
        _, g = _op_inplace(*tensors, *static)
        _written(base)
        return base, g
    y, _, g = _op(x, A, B, router_weight, router_bias, gates, base, seed, *static)
    return y, g


def rectified_mixture(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None = None,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    base: Tensor | None = None,
    inplace: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sum of LoRA experts of different ranks under a ReLU-gated router (RoDE, arXiv 2407.12730, Eq. 3-5).

    ``y = base + sum_i scaling_i * relu(h_i) * B_i A_i drop(x)`` with ``h = x Wr^T + br``. An expert whose gate is zero for a
    token is skipped for it, forward and backward.

    Args:
        x: (..., in_features); float64, float32, float16 or bfloat16.
        A: (R, in_features), the experts' down projections stacked in expert order; R = sum(ranks).
        B: (out_features, R), the up projections side by side.
        router_weight: (N, in_features). router_bias: (N,) or None.
        ranks: rank of each of the N experts. scaling: one finite float per expert (alpha / r_i in the paper).
        base: (..., out_features) in x's dtype, usually the frozen layer's output; None counts as zeros.
        inplace: accumulate into base and return it. Under torch.compile a new tensor is returned; under autograd a base that is a
            view (F.linear with a bias returns one for 3-D input) costs a copy.
        dropout_p: probability with which elements of the experts' input (not the router's) are dropped.
        seed: int, one-element int64 tensor on x's device, or None (drawn from torch's generator if dropout_p > 0).
        return_gates: also return the gates.
        backend: a name from `backends()`; default: RODE_BACKEND, else the best for x's device.

    A, B, router_weight and router_bias have x's dtype, or float32 where x has 16 bits: they are rounded once to x's dtype, sums are
    float32 (float64 for float64), gradients come back in the parameter's dtype. Autocast applies as to `F.linear`.

    Returns:
        y (..., out_features) in x's dtype; with return_gates also the gates (..., N) in float32 (float64 for float64), through
        which gradients flow.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.
    """
    check_tensor("router_weight", router_weight)
    mixture = make_mixture(ranks, scaling)
    args = (x, A, B, router_weight, router_bias, None, base)
    ordinary = (
        seed is None
        and type(dropout_p) is float
        and 0.0 <= dropout_p <= 1.0
        and not torch.compiler.is_compiling()
    )
    known = shortcut.find(mixture, args, inplace, dropout_p, backend) if ordinary else None
    if known is None or (inplace and base._is_view()):
        base_needed_grad = isinstance(base, Tensor) and base.requires_grad
        y, g = _run(*args, mixture, dropout_p, seed, inplace, False, backend)
        if ordinary:
            shortcut.remember(mixture, args, inplace, dropout_p, backend, base_needed_grad)
    else:
        if inplace:
            check_inplace(base, x)
        if dropout_p:
            seed = normalize_seed(None, dropout_p, x)
        if not (known.needs_grad and torch.is_grad_enabled()):
            y, _, g = known.run(*args, seed)
            if inplace:
                _written(base)
        else:
            static = (mixture.ranks, mixture.scaling, dropout_p, False, backend or "")
            if not (inplace or return_gates):
                return _apply_alone(*args, seed, known.run, static, known)
            y, _, g = (_apply_inplace if inplace else _apply)(*args, seed, known.run, static, known)
    return (y, g.view(*y.shape[:-1], mixture.num_experts)) if return_gates else y


def gated_mixture(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    gates: Tensor,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    base: Tensor | None = None,
    inplace: bool = False,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    gate_grad: str = "open",
    backend: str | None = None,
) -> Tensor:
    """Sum of LoRA experts under gates computed elsewhere: softmax, top-k, a task's weights, ...

    ``y = base + sum_i scaling_i * gates_i * B_i A_i drop(x)``; tokens for which gates_i is exactly 0 skip expert i.

    Args:
        gates: (..., N), any floating dtype, any sign; broadcasts over x's leading dimensions.
        gate_grad: "open" defines the gradient as 0 where gates are 0, which is exact for relu, top-k and threshold
            routers; "all" computes scaling_i <t_i, u_i> everywhere, for gates that rest at 0 and must be able to reopen.

    The other arguments, dtypes and errors are those of `rectified_mixture`.

    Returns:
        y (..., out_features) in x's dtype.
    """
    if gate_grad not in GATE_GRADS:
        raise ValueError(f"gate_grad: expected 'open' or 'all', got {gate_grad!r}")
    check_tensor("gates", gates)
    mixture = make_mixture(ranks, scaling)
    dense = gate_grad == "all"
    return _run(x, A, B, None, None, gates, base, mixture, dropout_p, seed, inplace, dense, backend)[0]
