"""As many gates are open as asked, every form is right, and a wrong one is an error."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import problem
from benchmarks.problem import Problem, check, draw_open, enough, forms
from rode_kernels import backends

BACKEND = "cpu" if backends()["cpu"].available else "reference"


def small(dtype=torch.float32, tokens=70, open=0.5, run=1, **options) -> Problem:
    return Problem.random(tokens, 32, 24, dtype, "cpu", (2, 5), open, run, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_open_share_is_as_asked(dtype, share):
    p = Problem.random(200, 64, 24, dtype, "cpu", (2, 4, 8, 16), share)
    gates = torch.relu(p.x.double() @ p.router.double().t())
    assert (gates > 0).double().mean().item() == p.open_share == share
    assert torch.equal(p.is_open, gates > 0)
    if 0 < share < 1:  # tokens differ, and no expert is always open
        assert len(p.is_open.unique(dim=0)) > 4
        assert not p.is_open.all(0).any()


def test_one_token_has_half_of_its_experts_open():
    p = Problem.random(1, 64, 24, torch.bfloat16, "cpu", (2, 4, 8, 16), 0.5)
    assert p.is_open.sum() == 2


def test_runs_of_tokens_open_the_same_experts():
    p = small(tokens=70, open=0.5, run=32)
    for rows in p.is_open.split(32):
        assert len(rows.unique(dim=0)) == 1
    assert len(p.is_open.unique(dim=0)) > 1
    pairs = draw_open(1024, 16, 0.1, 256, torch.Generator().manual_seed(0))
    assert pairs[::256].sum() == round(0.1 * 4 * 16)


def test_no_logit_is_near_zero():
    p = small(torch.bfloat16)
    assert (p.x.double() @ p.router.double().t()).abs().min() > problem.MARGIN / 2


def test_copies_are_more_than_the_cache_holds(monkeypatch):
    monkeypatch.setattr(problem, "cache_bytes", lambda device: 1000)
    assert enough(200, "cpu") == 10
    assert enough(300, "cpu") == 7
    assert enough(10**9, "cpu") == 2
    p = small(tokens=1)
    bytes_of_a_call = 4 * (32 + 7 * 32 + 24 * 7 + 2 * 32 + 24)
    monkeypatch.setattr(problem, "cache_bytes", lambda device: 2 * bytes_of_a_call)
    copies = p.copies()
    assert len(copies) == 4
    assert copies[0] is p
    for name in ("x", "A", "B", "router", "base", "dy"):
        tensors = [getattr(q, name) for q in copies]
        assert len({t.data_ptr() for t in tensors}) == 4
        assert all(torch.equal(t, tensors[0]) for t in tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_is_right_for_all_tokens(dtype):
    p = small(dtype)
    found = forms(p, [BACKEND])
    assert list(found) == [BACKEND, "packed", "loop"]
    check(p, found, chunk=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_form_is_right_under_dropout_with_float32_parameters(dtype):
    p = small(dtype, dropout=0.3, params_fp32=True)
    assert {t.dtype for t in (p.A, p.B, p.router)} == {torch.float32}
    assert {t.dtype for t in (p.x, p.base, p.dy)} == {dtype}
    assert p.open_share == 0.5
    keep = p.keep(chunk=32)
    assert torch.equal(keep, p.keep())
    assert 0.6 < keep.double().mean() < 0.8
    found = forms(p, [BACKEND])
    check(p, found, chunk=32)
    with pytest.raises(RuntimeError, match=r"loop is wrong \(y, .*nothing is timed"):
        check(
            replace(p, dropout=0.0),
            {"loop": replace(found["loop"], run=lambda *leaves: found["loop"].run(*leaves))},
        )


def test_dropout_is_drawn_anew_where_nothing_is_checked():
    p = small(dropout=0.5)
    for name, form in forms(p, [BACKEND]).items():
        first, second = (form.run(*form.leaves(p)) for _ in range(2))
        assert not torch.equal(first, second), name


@pytest.mark.slow
def test_compiled_forms_are_right():
    p = small()
    found = forms(p, ["reference"])
    check(p, {name: found[name].compiled() for name in ("packed", "loop")})


class WrongGradient(torch.autograd.Function):
    """A tensor whose last row has a gradient that is off."""

    @staticmethod
    def forward(ctx, t):
        return t.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[-1] *= 1.5
        return grad


def test_a_wrong_value_is_an_error():
    p = small()
    right = forms(p, ["reference"])["packed"]

    def late(*leaves):  # right for the first tokens
        y = right.run(*leaves)
        return torch.cat([y[:64], y[64:] * 1.01])

    def twice(*leaves):
        right.run_in_place(*leaves)
        return right.run_in_place(*leaves)

    with pytest.raises(RuntimeError, match=r"packed is wrong \(y, .*nothing is timed"):
        check(p, {"packed": replace(right, run=late)}, train=False, chunk=32)
    with pytest.raises(RuntimeError, match=r"packed is wrong \(y in place, .*nothing is timed"):
        check(p, {"packed": replace(right, run_in_place=twice)}, train=False, chunk=32)


@pytest.mark.parametrize("argument", ["x", "A", "B", "the router"])
def test_a_wrong_gradient_is_an_error(argument):
    p = small()
    right = forms(p, ["reference"])["loop"]

    def wrong(*leaves):
        leaves = list(leaves)
        at = ("x", "A", "B", "the router").index(argument)
        leaves[at] = WrongGradient.apply(leaves[at])
        return right.run(*leaves)

    form = {"loop": replace(right, run=wrong)}
    check(p, form, train=False)  # its values are right
    with pytest.raises(
        RuntimeError, match=rf"loop is wrong \(the gradient of {argument}, .*nothing is timed"
    ):
        check(p, form, chunk=32)


def test_a_gradient_that_is_wrong_in_place_alone_is_an_error():
    p = small()
    right = forms(p, ["reference"])["packed"]

    def wrong(x, *others):
        return right.run_in_place(WrongGradient.apply(x), *others)

    with pytest.raises(RuntimeError, match=r"packed is wrong \(the gradient of x, .*nothing is timed"):
        check(p, {"packed": replace(right, run_in_place=wrong)}, chunk=32)
