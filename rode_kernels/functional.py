"""The public functions: they check their arguments, then call the operator, or the fast path where nothing watches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from rode_kernels.autocast import cast_operands
from rode_kernels.autograd import MixtureFunction, fast_path, needs_autograd, record_inplace
from rode_kernels.checks import (
    GATE_GRADS,
    Seed,
    check_inplace,
    check_inputs,
    check_tensor,
    check_x,
    normalize_seed,
)
from rode_kernels.formula import formula, needs_formula, say_once
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import ForwardOperands, Settings
from rode_kernels.torch_ops import OP, OP_INPLACE, note_write


def _run(
    operands: ForwardOperands, seed: Seed, settings: Settings, inplace: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """y, and the gates as (M, N) or (..., N). The operands have no seed yet."""
    mixture, dropout_p, dense = settings
    check_x(operands.x)
    operands = cast_operands(operands, inplace)
    check_inputs(operands, settings)
    x, A, B, router_weight, router_bias, gates, base, _ = operands
    if gates is not None:
        gates = gates.expand(*x.shape[:-1], mixture.num_experts)
    if inplace:
        check_inplace(base, x)
    if needs_formula(x, A, B, router_weight, router_bias, gates, base):
        say_once("a transform of torch.func, forward-mode differentiation or torch.jit.trace")
        own_seed = None if seed is None else normalize_seed(seed, dropout_p, x)
        y, g = formula(ForwardOperands(x, A, B, router_weight, router_bias, gates, base, own_seed), settings)
        return (base.copy_(y) if inplace and base is not None else y), g
    used_seed = normalize_seed(seed, dropout_p, x)
    operands = ForwardOperands(x, A, B, router_weight, router_bias, gates, base, used_seed)
    static = (mixture.ranks, mixture.scaling, float(dropout_p), dense, backend or "")
    if base is None or not inplace or torch.compiler.is_compiling():
        y, _, g = OP(*operands, *static)
    elif not needs_autograd(operands):
        y, (_, g) = base, OP_INPLACE(*operands, *static)
        note_write(base)
    elif base._is_view():  # a Function with several outputs may not write into a view
        y, _, g = OP(*operands, *static)
        y = base.copy_(y)
    else:
        y, g = record_inplace(operands, static)
    return y, g


@overload
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
    return_gates: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
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
    return_gates: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
@overload
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
    return_gates: bool,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]: ...
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
    mixture = make_mixture(ranks, scaling)
    operands = (x, A, B, router_weight, router_bias, None, base, None)
    if fast_path is not None and seed is None:
        result = fast_path.call(MixtureFunction, operands, mixture, dropout_p, inplace, return_gates, backend)
        if result is not None:
            return result
    check_tensor("router_weight", router_weight)
    y, g = _run(ForwardOperands(*operands), seed, Settings(mixture, dropout_p, False), inplace, backend)
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
    operands = ForwardOperands(x, A, B, None, None, gates, base, None)
    settings = Settings(make_mixture(ranks, scaling), dropout_p, gate_grad == "all")
    return _run(operands, seed, settings, inplace, backend)[0]
