"""The autograd Functions, and the operators' registration with autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rode_kernels import fast_path as shortcut
from rode_kernels.checks import check_no_tangents
from rode_kernels.torch_ops import OP, OP_BACKWARD, TENSORS, all_gradients, library


def below_autograd(op: Callable, static: tuple) -> Callable:
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
    check_no_tangents(*tensors)
    if known is not None and shortcut.goes_back(known, tensors):
        grads = known.backward(*tensors, needs)
    elif shortcut.unwatched(tensors):
        grads = all_gradients(*tensors, *static, needs)
    else:
        grads = OP_BACKWARD(*tensors, *static, needs)
        grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
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
            return (None,) * (TENSORS + 3)
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


class MixtureInplace(torch.autograd.Function):
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
apply, apply_alone, apply_inplace = (
    super(torch.autograd.Function, f).apply for f in (_Mixture, _MixtureAlone, MixtureInplace)
)


class _MixtureBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return OP_BACKWARD(*args)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "rode_kernels: double backward is not supported; for second derivatives write the formula in PyTorch, "
            "or call backward with create_graph=False"
        )


def needs_autograd(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def _autograd(*args):
    check_no_tangents(*args[:TENSORS])
    if needs_autograd(args):
        tensors, static = args[:TENSORS], args[TENSORS:]
        return _Mixture.apply(*tensors, below_autograd(OP, static), static, None)
    with torch._C._AutoDispatchBelowAutograd():
        return OP(*args)


def _autograd_backward(*args):
    if needs_autograd(args):
        return _MixtureBackward.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return OP_BACKWARD(*args)


library.impl("mixture", _autograd, "Autograd")
library.impl("mixture_backward", _autograd_backward, "Autograd")
