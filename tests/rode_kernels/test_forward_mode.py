"""Forward-mode differentiation is refused in one sentence: tangents are never lost without a word."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from mixture_oracle import random_problem
from rode_kernels import gated_mixture, rectified_mixture

REFUSED = "forward-mode differentiation .* is not supported"
NAMES = ("x", "A", "B", "router_weight", "router_bias", "base")


def rectified(p, **changes):
    names = ("A", "B", "router_weight", "router_bias")
    arguments = {name: changes.get(name, getattr(p, name)) for name in (*names, "base")}
    return rectified_mixture(changes.get("x", p.x), **arguments, ranks=p.ranks, scaling=p.scaling)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("remembered", [False, True])
def test_a_dual_tensor_is_refused(name, grad, remembered):
    """Also by a call that goes straight to the kernels, as one like an earlier call does."""
    p = random_problem((5,))
    if grad:
        p.A.requires_grad_()
    if remembered:
        rectified(p)
    given = getattr(p, name).detach()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(given, torch.ones_like(given))
        with pytest.raises(NotImplementedError, match=REFUSED):
            rectified(p, **{name: dual})
    rectified(p)


@pytest.mark.parametrize("name", ["x", "A", "B", "gates", "base"])
def test_dual_gates_are_refused(name):
    p = random_problem((5,), router=False)
    arguments = {n: getattr(p, n) for n in ("x", "A", "B", "gates", "base")}
    with forward_ad.dual_level():
        arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        with pytest.raises(NotImplementedError, match=REFUSED):
            gated_mixture(**arguments, ranks=p.ranks, scaling=p.scaling)


TRANSFORMS = {
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (torch.ones_like(x),)),
    "jacfwd": lambda run, x: torch.func.jacfwd(run)(x),
    "linearize": lambda run, x: torch.func.linearize(run, x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_functional_transforms_are_refused(transform):
    p = random_problem((5,))
    with pytest.raises(NotImplementedError, match=REFUSED):
        transform(lambda x: rectified(p, x=x), p.x.detach())


def test_tangents_of_an_incoming_gradient_are_refused():
    p = random_problem((5,))
    x = p.x.detach().requires_grad_()
    y = rectified(p, x=x)
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(NotImplementedError, match=REFUSED):
            torch.autograd.grad(y, x, dy)


def test_within_a_dual_level_what_carries_no_tangent_runs():
    p = random_problem((5,))
    want = rectified(p)
    with forward_ad.dual_level():
        assert torch.equal(rectified(p), want)
