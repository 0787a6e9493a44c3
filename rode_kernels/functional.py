"""The public functions: arguments are checked here, then a call takes the shortcut or the operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rode_kernels import autograd as functions
from rode_kernels import fast_path as shortcut
from rode_kernels.autograd import below_autograd, needs_autograd
from rode_kernels.checks import (
    GATE_GRADS,
    check_inplace,
    check_inputs,
    check_no_tangents,
    check_tensor,
    check_x,
    normalize_seed,
)
from rode_kernels.mixture import Mixture, make_mixture
from rode_kernels.torch_ops import OP, OP_INPLACE, autocast_enabled


def _autocast(x: Tensor, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast x, base and parameters that are neither float32 nor of that dtype are cast, as for F.linear."""
    device = x.device.type
    if x.dtype == torch.float64 or not autocast_enabled(device):
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
    if base is not None and not inplace and autocast_enabled(x.device.type):
        base = base.to(x.dtype)
    check_inputs(mixture, x, A, B, router_weight, router_bias, gates, base, dropout_p)
    check_no_tangents(x, A, B, router_weight, router_bias, gates, base)
    if gates is not None:
        gates = gates.expand(*x.shape[:-1], mixture.num_experts)
    seed = normalize_seed(seed, dropout_p, x)
    static = (mixture.ranks, mixture.scaling, float(dropout_p), dense, backend or "")
    if inplace:
        check_inplace(base, x)
    if inplace and not torch.compiler.is_compiling():
        tensors = (x, A, B, router_weight, router_bias, gates, base, seed)
        if needs_autograd(tensors):
            if base._is_view():  # a Function with several outputs may not write into a view
                y, _, g = OP(*tensors, *static)
                return base.copy_(y), g
            y, _, g = functions.MixtureInplace.apply(
                *tensors, below_autograd(OP_INPLACE, static), static, None
            )
            return y, g
        _, g = OP_INPLACE(*tensors, *static)
        _written(base)
        return base, g
    y, _, g = OP(x, A, B, router_weight, router_bias, gates, base, seed, *static)
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
        and forward_ad._current_level < 0  # a tangent is nothing that the shortcut's guards see
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
                return functions.apply_alone(*args, seed, known.run, static, known)
            y, _, g = (functions.apply_inplace if inplace else functions.apply)(
                *args, seed, known.run, static, known
            )
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
