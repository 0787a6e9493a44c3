"""Mixtures of several layers that read the same x (siblings: q, k, v; gate, up), below autograd: x is read and dx written once.

    y_j = base_j + sum_i scaling_ji relu(h_ji) B_ji A_ji drop_j(x)        dx = sum_j dx_j

Callers have checked the arguments, as `rode_kernels.functional` does. A backend runs all siblings together where it has kernels
for that. Otherwise they run one by one, which gives the same results and reads x once for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rode_kernels.autocast import without_autocast
from rode_kernels.backends.reference import accumulation_dtype
from rode_kernels.backends.registry import Backend, select_backend
from rode_kernels.mixture import Mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, MaybeTensor, Settings
from rode_kernels.passes import Needs, Outputs


class Sibling(NamedTuple):
    """One of the mixtures: its parameters as `rectified_mixture` takes them, ranks and scaling.

    Attributes:
        seed: (1,), int64, of its dropout; None without. Siblings with the same tensor drop the same elements of x.
    """

    A: Tensor
    B: Tensor
    router_weight: Tensor
    router_bias: Tensor | None
    mixture: Mixture
    seed: Tensor | None = None


class SiblingNeeds(NamedTuple):
    """Which gradients of a sibling are wanted; x's is asked for once for all of them."""

    A: bool = True
    B: bool = True
    router_weight: bool = True
    router_bias: bool = True


def _rows(t: MaybeTensor) -> MaybeTensor:
    """(..., C) as (M, C): a view where strides allow one."""
    if t is None:
        return t
    return t.reshape(-1, t.shape[-1]) if t.numel() else t.new_empty(0, t.shape[-1])


def _select(name: str, x: Tensor, siblings: Sequence[Sibling]) -> list[Backend]:
    """The backend of each."""
    return [select_backend(name, x, sibling.B.shape[0], sibling.mixture) for sibling in siblings]


def mixtures_forward(
    x: Tensor,
    siblings: Sequence[Sibling],
    bases: Sequence[Tensor | None],
    *,
    dropout_p: float = 0.0,
    backend: str = "",
) -> list[Outputs]:
    """The forward pass of all siblings.

    Args:
        x: (..., K). bases: (..., O_j) in x's dtype, which the caller owns: y_j is accumulated into it. None: y_j is a new tensor.
        dropout_p: the same for all siblings; with dropout each has a seed.
        backend: as in `rectified_mixture`; "" for the best one.

    Returns:
        For each sibling y (..., O_j), which is base_j if there is one, u (M, R_j) and g (M, N_j), to be saved for backward.
    """
    return _forward(x, siblings, bases, dropout_p, backend)


@without_autocast
def _forward(
    x: Tensor, siblings: Sequence[Sibling], bases: Sequence[Tensor | None], dropout_p: float, backend: str
) -> list[Outputs]:
    flat, acc_dtype = _rows(x), accumulation_dtype(x.dtype)
    operands = []
    for (A, B, router_weight, router_bias, _, seed), base in zip(siblings, bases, strict=True):
        bias = None if router_bias is None else router_bias.to(acc_dtype).contiguous()
        operands.append(ForwardOperands(flat, A, B, router_weight, bias, None, _rows(base), seed))
    settings = [Settings(sibling.mixture, dropout_p, False) for sibling in siblings]
    backends, outputs = _select(backend, x, siblings), None
    if len(siblings) > 1 and all(b is backends[0] for b in backends):
        outputs = backends[0].forward_siblings(operands, settings)
    if outputs is None:
        outputs = [
            b.forward(o, s, o.base is not None) for b, o, s in zip(backends, operands, settings, strict=True)
        ]
    results = []
    for (y, u, g), base in zip(outputs, bases, strict=True):
        y = y.view(*x.shape[:-1], y.shape[-1])
        if base is not None:
            # strides that do not flatten, or that the backend does not write to
            y = base if y.data_ptr() == base.data_ptr() else base.copy_(y)
        results.append((y, u, g))
    return results


def mixtures_backward(
    x: Tensor,
    siblings: Sequence[Sibling],
    saved: Sequence[tuple[Tensor, Tensor]],
    dys: Sequence[Tensor | None],
    *,
    dgates: Sequence[Tensor | None] | None = None,
    need_x: bool = True,
    needs: Sequence[SiblingNeeds] | None = None,
    dropout_p: float = 0.0,
    backend: str = "",
) -> tuple[Tensor | None, list[Gradients]]:
    """The backward pass of all siblings.

    Args:
        x, siblings, dropout_p, backend: those of `mixtures_forward`.
        saved: u and g of each sibling. dys: (..., O_j) with any strides, or None where no gradient reaches y_j.
        dgates: (M, N_j), gradients that reach the gates, or None.
        needs: the gradients that are wanted (default: all).

    Returns:
        dx (..., K), the sum over all siblings, or None if it is not wanted, and the gradients of each sibling's parameters.
    """
    wanted = [SiblingNeeds()] * len(siblings) if needs is None else needs
    all_dgates = [None] * len(siblings) if dgates is None else dgates
    return _backward(x, siblings, saved, dys, all_dgates, need_x, wanted, dropout_p, backend)


@without_autocast
def _backward(
    x: Tensor,
    siblings: Sequence[Sibling],
    saved: Sequence[tuple[Tensor, Tensor]],
    dys: Sequence[Tensor | None],
    all_dgates: Sequence[Tensor | None],
    need_x: bool,
    wanted: Sequence[SiblingNeeds],
    dropout_p: float,
    backend: str,
) -> tuple[Tensor | None, list[Gradients]]:
    flat = _rows(x)
    reached, operands, settings, all_needs = [], [], [], []
    for j, (sibling, (u, g), dy, dgate) in enumerate(zip(siblings, saved, dys, all_dgates, strict=True)):
        A, B, router_weight, router_bias, mixture, seed = sibling
        need = wanted[j]
        need_bias = need.router_bias and router_bias is not None
        if dy is None and dgate is None:
            continue  # all its gradients are 0
        if not (need_x or need.A or need.B or need.router_weight or need_bias):
            continue
        if dgate is not None:
            dgate = dgate.to(g.dtype).reshape(g.shape).contiguous()
        reached.append(j)
        operands.append(BackwardOperands(_rows(dy), dgate, flat, u, g, A, B, router_weight, seed))
        settings.append(Settings(mixture, dropout_p, False))
        all_needs.append((need_x, need.A, need.B, need.router_weight, need_bias, False))
    backends = _select(backend, x, [siblings[j] for j in reached])
    found = None
    if len(reached) > 1 and all(b is backends[0] for b in backends):
        found = backends[0].backward_siblings(operands, settings, all_needs)
    if found is None:
        found = _one_by_one(backends, operands, settings, all_needs)
    dx = found[0].x if found else None
    if need_x:
        dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if dx is None else dx.view(x.shape)
    by_sibling = dict(zip(reached, found, strict=True))
    return dx, [
        _like_parameters(by_sibling[j], sibling) if j in by_sibling else _zeros(sibling, need)
        for j, (sibling, need) in enumerate(zip(siblings, wanted, strict=True))
    ]


def _one_by_one(
    backends: Sequence[Backend],
    operands: Sequence[BackwardOperands],
    settings: Sequence[Settings],
    needs: Sequence[Needs],
) -> list[Gradients]:
    """A call after the other. The sum of their gradients of x is rounded once."""
    found = [b.backward(o, s, n) for b, o, s, n in zip(backends, operands, settings, needs, strict=True)]
    if len(found) < 2 or found[0].x is None:
        return found
    dtype = found[0].x.dtype
    total = found[0].x.to(accumulation_dtype(dtype))
    for of_j in found[1:]:
        assert of_j.x is not None, "asked for"
        total = total.add_(of_j.x)
    return [of_j._replace(x=None if j else total.to(dtype)) for j, of_j in enumerate(found)]


def _like_parameters(grads: Gradients, sibling: Sibling) -> Gradients:
    """Without dx, each in its parameter's dtype, but the bias's, which stays in the accumulation dtype as in `Gradients`."""

    def like(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
        return grad if grad is None else grad.to(parameter.dtype).contiguous()

    return Gradients(
        None,
        like(grads.A, sibling.A),
        like(grads.B, sibling.B),
        like(grads.router_weight, sibling.router_weight),
        grads.router_bias,
        None,
    )


def _zeros(sibling: Sibling, need: SiblingNeeds) -> Gradients:
    A, B, router_weight, router_bias, _, _ = sibling
    bias = None
    if need.router_bias and router_bias is not None:
        bias = torch.zeros_like(router_bias, dtype=accumulation_dtype(A.dtype))
    return Gradients(
        None,
        torch.zeros_like(A) if need.A else None,
        torch.zeros_like(B) if need.B else None,
        torch.zeros_like(router_weight) if need.router_weight else None,
        bias,
        None,
    )
