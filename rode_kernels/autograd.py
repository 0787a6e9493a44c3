"""The autograd Function, and the operators' registration with autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rode_kernels import formula
from rode_kernels.checks import check_no_tangents, has_tangents
from rode_kernels.formula import say_once
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients
from rode_kernels.passes import Call, Needs, Outputs, PlainOperands, StaticArguments
from rode_kernels.torch_ops import (
    OP,
    OP_BACKWARD,
    OP_INPLACE,
    TENSORS,
    TENSORS_BACKWARD,
    library,
    settings_of,
)

try:  # the one place that knows that this file may be missing: every call then takes the long way
    from rode_kernels import fast_path as fast_path
except ImportError:
    fast_path = None  # type: ignore[assignment]  # mypy takes a module for always there


class MixtureFunction(torch.autograd.Function):
    """Takes the operands and a `Call`; gives y, u, g, or y alone."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        router_weight: Tensor | None,
        router_bias: Tensor | None,
        gates: Tensor | None,
        base: Tensor | None,
        seed: Tensor | None,
        call: Call,
    ) -> Tensor | Outputs:
        y, u, g = call.run((x, A, B, router_weight, router_bias, gates, base, seed))
        # x, u, g and the parameters themselves: nothing of width O, no copy of x, no mask. A second derivative needs the last two.
        ctx.save_for_backward(x, u, g, A, B, router_weight, seed, router_bias, gates)
        ctx.set_materialize_grads(False)
        bias_dtype = None if router_bias is None else router_bias.dtype
        ctx.others = call, bias_dtype, None if gates is None else (gates.shape, gates.dtype)
        if call.inplace:
            ctx.mark_dirty(base)
        if call.only_y:
            return y
        ctx.mark_non_differentiable(*((u,) if gates is None else (u, g)))  # nobody returns given gates
        return y, u, g

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _du: None = None, dgates: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if dy is None and dgates is None:
            return (None,) * (TENSORS + 1)
        call, bias_dtype, gates_like = ctx.others
        needs = ctx.needs_input_grad[:6]
        grads = differentiate(call, dy, dgates, ctx.saved_tensors, bias_dtype, needs)
        dx, dA, dB, drouter_weight, drouter_bias, dg = grads
        if dg is not None:
            shape, dtype = gates_like
            dg = dg.to(dtype).view(shape)
        dbase = dy if ctx.needs_input_grad[6] else None
        return dx, dA, dB, drouter_weight, drouter_bias, dg, dbase, None, None


def differentiate(
    call: Call,
    dy: Tensor | None,
    dgates: Tensor | None,
    saved: tuple[Any, ...],
    bias_dtype: torch.dtype | None,
    needs: Needs,
) -> Gradients:
    """A recorded call's gradients: differentiable again where autograd records its backward pass.

    Args:
        saved: x, u, g, A, B, router_weight, seed, router_bias, gates, as they were saved.
        bias_dtype: of the router's bias, which its gradient is returned in.
    """
    *others, router_bias, gates = saved
    operands = BackwardOperands._make((dy, dgates, *others))
    if has_tangents(*operands):
        say_once("forward-mode differentiation of a gradient")
        grads = formula.gradients(operands, router_bias, gates, settings_of(call.static), needs)
    elif torch.is_grad_enabled():  # create_graph=True
        grads = Gradients._make(_BackwardFunction.apply(*operands, router_bias, gates, call, needs))  # type: ignore[no-untyped-call]
    else:
        grads = _gradients(call, operands, needs)
    if grads.router_bias is not None and grads.router_bias.dtype != bias_dtype:
        grads = grads._replace(router_bias=grads.router_bias.to(bias_dtype))
    return grads


def _gradients(call: Call, operands: BackwardOperands, needs: Needs) -> Gradients:
    if fast_path is not None:
        found = fast_path.backward(call.prepared, operands, call.static, needs)
        if found is not None:
            return found
    grads = OP_BACKWARD(*operands, *call.static, needs)
    return Gradients(*(grad if need else None for grad, need in zip(grads, needs, strict=True)))


class _BackwardFunction(torch.autograd.Function):
    """The gradients of a call. Their own derivatives, of any order, are those of the formula."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        *tensors, call, needs = args
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.others = call, needs
        return tuple(_gradients(call, BackwardOperands._make(tensors[:TENSORS_BACKWARD]), needs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        say_once("a second derivative")
        (call, needs), again = ctx.others, torch.is_grad_enabled()
        with torch.enable_grad():
            # Aliases, because dy was computed from x: a derivative with respect to x itself would go through dy as well.
            tensors = [formula.alias(t) for t in ctx.saved_tensors]
            *operands, router_bias, gates = tensors
            first = formula.gradients(
                BackwardOperands._make(operands), router_bias, gates, settings_of(call.static), needs
            )
            pairs = [
                (out, grad)
                for out, grad in zip(first, grads, strict=True)
                if out is not None and grad is not None
            ]
            wanted = [t for t, need in zip(tensors, ctx.needs_input_grad, strict=False) if need]
            found = torch.autograd.grad(
                [out for out, _ in pairs],
                wanted,
                [grad.view_as(out).to(out.dtype) for out, grad in pairs],
                create_graph=again,
                allow_unused=True,
            )
        results = iter(found)
        return *(next(results) if need else None for need in ctx.needs_input_grad[:-2]), None, None


class _RefusedBackward(torch.autograd.Function):
    """The operator `rode::mixture_backward`, called by itself: what it was given does not say what u and g were made of."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        return below_autograd(OP_BACKWARD, args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(
            "rode_kernels: rode::mixture_backward has no derivative; differentiate the public functions, which have"
        )


# `Any`: an operator, and `Function.apply`, have no types.


def below_autograd(op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def needs_autograd(args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in args)


def record_inplace(operands: ForwardOperands, static: StaticArguments) -> tuple[Tensor, Tensor]:
    """y, which is base, and g of `rode::mixture_`, recorded by autograd."""

    def run(operands: PlainOperands) -> Any:
        return operands[6], *below_autograd(OP_INPLACE, (*operands, *static))

    y, _, g = MixtureFunction.apply(*operands, Call(run, static, inplace=True))  # type: ignore[no-untyped-call]
    return y, g


def _autograd(*args: Any) -> Any:
    check_no_tangents(*args[:TENSORS])
    if not needs_autograd(args):
        return below_autograd(OP, args)
    operands, static = args[:TENSORS], args[TENSORS:]
    call = Call(lambda operands: below_autograd(OP, (*operands, *static)), static)
    return MixtureFunction.apply(*operands, call)  # type: ignore[no-untyped-call]


def _autograd_backward(*args: Any) -> Any:
    if not needs_autograd(args):
        return below_autograd(OP_BACKWARD, args)
    return _RefusedBackward.apply(*args)  # type: ignore[no-untyped-call]


library.impl("mixture", _autograd, "Autograd")
library.impl("mixture_backward", _autograd_backward, "Autograd")
