"""`rectified_linear`: a linear layer's product and the mixture that is added to it, as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from rode_kernels.autocast import autocast_dtype, cast_operands
from rode_kernels.autograd import below_autograd, differentiate, fast_path
from rode_kernels.checks import (
    check_inputs,
    check_linear,
    check_tensor,
    check_x,
    has_tangents,
    normalize_seed,
)
from rode_kernels.formula import needs_formula
from rode_kernels.functional import rectified_mixture
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import ForwardOperands, Settings
from rode_kernels.passes import Call, Outputs, PlainOperands
from rode_kernels.torch_ops import OP_INPLACE

# PyTorch's own: what a library puts in the place of `F.linear` may keep what it returns.
_linear = torch._C._nn.linear
_unsafe_view = torch.ops.aten._unsafe_view.default
_TYPES = (Tensor, Parameter)


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias as a tensor of its own: `F.linear` makes a view for some shapes."""
    y: Tensor = _linear(x, weight, bias)
    return _unsafe_view(y, y.shape) if y._is_view() else y


class LinearMixtureFunction(torch.autograd.Function):
    """Takes weight, bias, the operands of `MixtureFunction` except gates and base, and a `Call` that writes into base; gives y, u,
    g, or y alone."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        router_weight: Tensor,
        router_bias: Tensor | None,
        seed: Tensor | None,
        call: Call,
    ) -> Tensor | Outputs:
        base = product(x, weight, bias)
        y, u, g = call.run((x, A, B, router_weight, router_bias, None, base, seed))
        ctx.save_for_backward(weight, x, u, g, A, B, router_weight, seed, router_bias, None)
        ctx.set_materialize_grads(False)
        ctx.others = call, None if router_bias is None else router_bias.dtype
        if call.only_y:
            return y
        ctx.mark_non_differentiable(u)
        return y, u, g

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, _du: None = None, dgates: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        if dy is None and dgates is None:
            return (None,) * 9
        weight, *saved = ctx.saved_tensors
        call, bias_dtype = ctx.others
        need_weight, need_bias, *need_others = ctx.needs_input_grad[:7]
        x, needs = saved[0], (*need_others, False)
        dx = dA = dB = drouter_weight = drouter_bias = dweight = dbias = None
        if any(needs):
            grads = differentiate(call, dy, dgates, tuple(saved), bias_dtype, needs)
            dx, dA, dB, drouter_weight, drouter_bias, _ = grads
        if dy is not None:
            dx, dweight, dbias = add_product_gradients(dx, dy, x, weight, need_weight, need_bias)
        return dweight, dbias, dx, dA, dB, drouter_weight, drouter_bias, None, None


def add_product_gradients(
    dx: Tensor | None, dy: Tensor, x: Tensor, weight: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of x, which the product's is accumulated into, of the weight and of the bias.

    Args:
        dx: the mixture's, which the caller owns; None where x needs no gradient.
    """
    device = x.device.type
    if (
        autocast_dtype(device) is not None
    ):  # around a backward pass it would round what the forward pass had in float32
        with torch.autocast(device, enabled=False):
            return add_product_gradients(dx, dy, x, weight, need_weight, need_bias)
    flat_dy = _flat(dy)
    if dx is not None and (torch.is_grad_enabled() or has_tangents(dx, dy, weight)):
        dx = dx + dy @ weight
    elif dx is not None:
        _flat(dx).addmm_(flat_dy, weight)
    dweight = flat_dy.t() @ _flat(x) if need_weight else None
    dbias = flat_dy.sum(0) if need_bias else None
    return dx, dweight, dbias


def _flat(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


@overload
def rectified_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None = None,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def rectified_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None = None,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
def rectified_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None = None,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
def rectified_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    router_weight: Tensor,
    router_bias: Tensor | None = None,
    *,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """A linear layer and its mixture of LoRA experts under a ReLU-gated router (RoDE, arXiv 2407.12730, Eq. 3-5).

    ``y = x weight^T + bias + sum_i scaling_i * relu(h_i) * B_i A_i drop(x)`` with ``h = x Wr^T + br``. This is
    ``rectified_mixture(..., base=F.linear(x, weight, bias))`` with a pass less over y forward and two less over dx backward:
    PyTorch makes the product and the mixture is added to it in place; backward the mixture writes dx, and the product's gradient is
    accumulated into it.

    Args:
        x: (..., in_features); float64, float32, float16 or bfloat16.
        weight: (out_features, in_features), in x's dtype. bias: (out_features,), in x's dtype, or None. Both may be frozen; where
            they require gradients they get them.

    The other arguments, dtypes and errors are those of `rectified_mixture`. Autocast casts x, weight and bias as for `F.linear`.
    Under torch.compile, torch.func, forward mode, a mode that watches operations (`TorchDispatchMode`, `TorchFunctionMode`), and
    for tensor subclasses the product and the mixture are two operations that overwrite nothing.

    Returns:
        y (..., out_features) in x's dtype; with return_gates also the gates (..., N) in float32 (float64 for float64), through
        which gradients flow.

    Raises:
        TypeError, ValueError: naming the argument, what it got and what was wanted.
    """
    mixture = make_mixture(ranks, scaling)
    operands = (x, A, B, router_weight, router_bias, None, None, None)
    if fast_path is not None and seed is None:
        result = fast_path.call_linear(
            LinearMixtureFunction, product, weight, bias, operands, mixture, dropout_p, return_gates, backend
        )
        if result is not None:
            return result
    check_tensor("router_weight", router_weight)
    check_x(x)
    given = cast_operands(ForwardOperands(*operands), False)
    weight, bias = cast_linear(weight, bias, given.x)
    settings = Settings(mixture, dropout_p, False)
    check_inputs(given, settings)
    check_linear(weight, bias, given.x, B.shape[0])
    tensors = [t for t in (*given, weight, bias) if t is not None]
    if watched(tensors):
        assert given.router_weight is not None, "checked"
        return rectified_mixture(
            given.x,
            given.A,
            given.B,
            given.router_weight,
            given.router_bias,
            ranks=ranks,
            scaling=scaling,
            base=torch.nn.functional.linear(given.x, weight, bias),
            dropout_p=dropout_p,
            seed=seed,
            return_gates=return_gates,
            backend=backend,
        )
    static = (mixture.ranks, mixture.scaling, float(dropout_p), False, backend or "")

    def run(operands: PlainOperands) -> Outputs:
        base = operands[6]
        assert base is not None, "the product"
        u, g = below_autograd(OP_INPLACE, (*operands, *static))
        return base, u, g

    y, _, g = LinearMixtureFunction.apply(  # type: ignore[no-untyped-call]
        *(weight, bias, *given[:5], normalize_seed(seed, dropout_p, given.x)), Call(run, static, True)
    )
    return (y, g.view(*y.shape[:-1], mixture.num_experts)) if return_gates else y


def cast_linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """weight and bias as autocast has them beside x."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None or x.dtype == torch.float64 or not isinstance(weight, Tensor):
        return weight, bias
    return weight.to(dtype), bias.to(dtype) if isinstance(bias, Tensor) else bias


def watched(tensors: Sequence[Tensor]) -> bool:
    """Whether anybody may hold the product, or has to see it and the mixture as two operations."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or needs_formula(*tensors)
        or any(type(t) not in _TYPES for t in tensors)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
    )
