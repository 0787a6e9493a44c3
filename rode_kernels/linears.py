"""`rectified_linears`: several linear layers that read the same x, each with its mixture, as one node of autograd's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from rode_kernels.autocast import autocast_dtype, cast_operands
from rode_kernels.autograd import differentiate
from rode_kernels.checks import (
    check_inputs,
    check_linear,
    check_tensor,
    check_x,
    has_tangents,
    normalize_seed,
)
from rode_kernels.functional import rectified_mixture
from rode_kernels.linear import add_product_gradients, cast_linear, product, watched
from rode_kernels.mixture import Mixture, make_mixture
from rode_kernels.operands import ForwardOperands, Gradients, Settings
from rode_kernels.passes import Call
from rode_kernels.siblings import Sibling, SiblingNeeds, mixtures_backward, mixtures_forward


class AdaptedLinear(NamedTuple):
    """One of the layers that read the same x: the operands of `rectified_linear`.

    Attributes:
        weight: (out_features, in_features). bias: (out_features,) or None. Both in x's dtype.
        A: (R, in_features). B: (out_features, R). router_weight: (N, in_features). router_bias: (N,) or None.
        ranks, scaling: a number for each of the N experts.
    """

    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    router_weight: Tensor
    router_bias: Tensor | None
    ranks: Sequence[int]
    scaling: Sequence[float]


_TENSORS = 6  # of each layer
_Tensors = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor | None]


class _Settings(NamedTuple):
    mixtures: tuple[Mixture, ...]
    dropout_p: float
    backend: str


class SiblingsFunction(torch.autograd.Function):
    """Takes x, settings, a seed for each layer, and the tensors of each layer in a row; gives every y, then every g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: _Settings, *given: Tensor | None) -> tuple[Tensor, ...]:
        count = len(settings.mixtures)
        layers = _by_layer(given[count:])
        siblings = _siblings(layers, settings, given[:count])
        bases = [product(x, weight, bias) for weight, bias, *_ in layers]
        outputs = mixtures_forward(x, siblings, bases, dropout_p=settings.dropout_p, backend=settings.backend)
        us, gs = [u for _, u, _ in outputs], [g for _, _, g in outputs]
        ctx.save_for_backward(x, *us, *gs, *given)
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        return *(y for y, _, _ in outputs), *gs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        count, settings = len(ctx.settings.mixtures), ctx.settings
        x, *rest = ctx.saved_tensors
        us, gs, seeds = (rest[count * i : count * (i + 1)] for i in range(3))
        layers = _by_layer(rest[3 * count :])
        need_x, flat_needs = ctx.needs_input_grad[0], ctx.needs_input_grad[2 + count :]
        needs = [flat_needs[_TENSORS * j : _TENSORS * (j + 1)] for j in range(count)]
        dys, dgates = grads[:count], grads[count:]
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        saved = [(x, u, g, *layer) for u, g, layer in zip(us, gs, layers, strict=True)]
        if torch.is_grad_enabled() or has_tangents(x, *grads, *rest):
            dx, found = _one_by_one(settings, seeds, saved, dys, dgates, need_x, needs)
        else:
            dx, found = mixtures_backward(
                x,
                _siblings(layers, settings, seeds),
                list(zip(us, gs, strict=True)),
                dys,
                dgates=dgates,
                need_x=need_x,
                needs=[SiblingNeeds(*need[2:]) for need in needs],
                dropout_p=settings.dropout_p,
                backend=settings.backend,
            )
        results: list[Tensor | None] = []
        for dy, dgate, layer, need, of_one in zip(dys, dgates, layers, needs, found, strict=True):
            if dy is None and dgate is None:  # as of a layer that was not called
                results += [None] * _TENSORS
                continue
            dweight = dbias = None
            if dy is not None:
                dx, dweight, dbias = add_product_gradients(dx, dy, x, layer[0], need[0], need[1])
            drouter_bias, router_bias = of_one.router_bias, layer[5]
            if drouter_bias is not None and router_bias is not None:
                drouter_bias = drouter_bias.to(router_bias.dtype)
            results += [dweight, dbias, of_one.A, of_one.B, of_one.router_weight, drouter_bias]
        return dx, None, *(None,) * count, *results


def _by_layer(flat: Sequence[Any]) -> list[_Tensors]:
    return [tuple(flat[i : i + _TENSORS]) for i in range(0, len(flat), _TENSORS)]


def _siblings(
    layers: Sequence[_Tensors], settings: _Settings, seeds: Sequence[Tensor | None]
) -> list[Sibling]:
    return [
        Sibling(*layer[2:], mixture, seed)
        for layer, mixture, seed in zip(layers, settings.mixtures, seeds, strict=True)
    ]


def _one_by_one(
    settings: _Settings,
    seeds: Sequence[Tensor | None],
    saved: Sequence[tuple[Any, ...]],
    dys: Sequence[Tensor | None],
    dgates: Sequence[Tensor | None],
    need_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[Gradients]]:
    """The mixtures' gradients, differentiable again."""
    dx, found = None, []
    for j, (x, u, g, _, _, A, B, router_weight, router_bias) in enumerate(saved):
        wanted = (need_x, *needs[j][2:], False)
        if not any(wanted) or (dys[j] is None and dgates[j] is None):
            found.append(Gradients(*(None,) * 6))
            continue
        mixture = settings.mixtures[j]
        static = (mixture.ranks, mixture.scaling, settings.dropout_p, False, settings.backend)
        operands = (x, u, g, A, B, router_weight, seeds[j], router_bias, None)
        dtype = None if router_bias is None else router_bias.dtype
        grads = differentiate(_not_run(static), dys[j], dgates[j], operands, dtype, wanted)
        if grads.x is not None:
            dx = grads.x if dx is None else dx + grads.x
        found.append(grads)
    if need_x and dx is None:
        dx = torch.zeros_like(saved[0][0])
    return dx, found


def _not_run(static: Any) -> Call:
    def run(operands: Any) -> Any:
        raise AssertionError("the forward pass is over")

    return Call(run, static)


@overload
def rectified_linears(
    x: Tensor,
    linears: Sequence[AdaptedLinear],
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: Literal[False] = False,
    backend: str | None = None,
) -> list[Tensor]: ...
@overload
def rectified_linears(
    x: Tensor,
    linears: Sequence[AdaptedLinear],
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: Literal[True],
    backend: str | None = None,
) -> list[tuple[Tensor, Tensor]]: ...
@overload
def rectified_linears(
    x: Tensor,
    linears: Sequence[AdaptedLinear],
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: bool,
    backend: str | None = None,
) -> list[Tensor] | list[tuple[Tensor, Tensor]]: ...
def rectified_linears(
    x: Tensor,
    linears: Sequence[AdaptedLinear],
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    return_gates: bool = False,
    backend: str | None = None,
) -> list[Tensor] | list[tuple[Tensor, Tensor]]:
    """Linear layers that read the same x (q, k and v; gate and up), each with its mixture: x is read, and dx written, once for all.

    ``[rectified_linear(x, *layer, seed=seed) for layer in linears]``, but that the mixtures share a pass over x forward and
    backward, and the gradients that reach x are summed in one buffer.

    Args:
        x: (..., in_features). linears: one or more layers, see `AdaptedLinear`.
        dropout_p: probability with which elements of the experts' input are dropped.
        seed: as in `rectified_mixture`. One that is given is for all layers, which then drop the same elements of x; None draws one
            for each layer, in their order.
        return_gates: also return the gates.
        backend: a name from `backends()`. Where a backend has no kernels for several mixtures at once, they run one by one.

    Dtypes, autocast, and who may watch are those of `rectified_linear`.

    Returns:
        For each layer y (..., out_features), with return_gates the pair of y and its gates (..., N).

    Raises:
        TypeError, ValueError: naming the layer and the argument, what it got and what was wanted.
    """
    if not linears:
        raise ValueError("linears: expected at least one layer, got an empty sequence")
    check_x(x)
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
    layers, mixtures = [], []
    for j, given in enumerate(linears):
        try:
            layer, mixture = _checked(x, AdaptedLinear(*given), dropout_p)
        except (TypeError, ValueError) as error:
            raise type(error)(f"linears[{j}]: {error}") from None
        layers.append(layer)
        mixtures.append(mixture)
    seeds: list[Tensor | None]
    if seed is None:
        seeds = [normalize_seed(None, dropout_p, x) for _ in layers]
    else:
        seeds = [normalize_seed(seed, dropout_p, x)] * len(layers)
    if x.is_meta or watched([x, *(t for layer in layers for t in layer if t is not None)]):
        results = [
            rectified_mixture(
                x,
                *layer[2:],
                ranks=mixture.ranks,
                scaling=mixture.scaling,
                base=torch.nn.functional.linear(x, layer[0], layer[1]),
                dropout_p=dropout_p,
                seed=own_seed,
                return_gates=True,
                backend=backend,
            )
            for layer, mixture, own_seed in zip(layers, mixtures, seeds, strict=True)
        ]
        return results if return_gates else [y for y, _ in results]
    settings = _Settings(tuple(mixtures), float(dropout_p), backend or "")
    flat = [t for layer in layers for t in layer]
    outputs = SiblingsFunction.apply(x, settings, *seeds, *flat)  # type: ignore[no-untyped-call]
    ys, gs = outputs[: len(layers)], outputs[len(layers) :]
    if not return_gates:
        return list(ys)
    return [(y, g.view(*y.shape[:-1], g.shape[-1])) for y, g in zip(ys, gs, strict=True)]


def _checked(x: Tensor, given: AdaptedLinear, dropout_p: float) -> tuple[_Tensors, Mixture]:
    weight, bias, A, B, router_weight, router_bias, ranks, scaling = given
    mixture = make_mixture(ranks, scaling)
    check_tensor("router_weight", router_weight)
    operands = cast_operands(
        ForwardOperands(x, A, B, router_weight, router_bias, None, None, None), inplace=False
    )
    check_inputs(operands, Settings(mixture, dropout_p, False))
    weight, bias = cast_linear(weight, bias, x)
    check_linear(weight, bias, x, operands.B.shape[0])
    assert operands.router_weight is not None, "checked"
    tensors = weight, bias, operands.A, operands.B, operands.router_weight, operands.router_bias
    return tensors, mixture
