"""torch.func, forward-mode differentiation, second derivatives and tracing, beside the formula in float64."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from mixture_oracle import random_problem
from rode_kernels import RectifiedMixture, formula, gated_mixture, rectified_mixture
from rode_kernels.formula import say_once

ROUTED = ("x", "A", "B", "router_weight", "router_bias", "base")
GATED = ("x", "A", "B", "gates", "base")


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="rode_kernels: .* takes plain PyTorch")
        yield


def case(routed, tokens=(2, 3)):
    """A problem, its operands by name, and a function of them."""
    p = random_problem(tokens, K=6, O=5, ranks=(1, 3, 2), router=routed, dtype=torch.float64)
    operands = {name: getattr(p, name).detach() for name in (ROUTED if routed else GATED)}
    # a product with a gate of 0 has a gradient in plain PyTorch, too
    function = rectified_mixture if routed else partial(gated_mixture, gate_grad="all")

    def run(**tensors):
        return function(**tensors, ranks=p.ranks, scaling=p.scaling)

    def plain(x, A, B, base, router_weight=None, router_bias=None, gates=None):
        if gates is None:
            gates = torch.relu(x @ router_weight.T + router_bias)
        y, start = base, 0
        for i, rank in enumerate(p.ranks):
            rows = slice(start, start + rank)
            y = y + p.scaling[i] * gates[..., i, None] * ((x @ A[rows].T) @ B[:, rows].T)
            start += rank
        return y

    return operands, run, plain


def of(function, operands, name):
    """`function` as one of the operand `name` alone."""
    return lambda t: function(**{**operands, name: t})


def loss(function, operands, name):
    return lambda t: of(function, operands, name)(t).sin().sum()


CASES = [(True, name) for name in ROUTED] + [(False, name) for name in GATED]
TRANSFORMS = {
    "grad": lambda f, scalar, t: grad(scalar)(t),
    "vjp": lambda f, scalar, t: vjp(f, t)[1](torch.cos(f(t)))[0],
    "jacrev": lambda f, scalar, t: jacrev(f)(t),
    "jacfwd": lambda f, scalar, t: jacfwd(f)(t),
    "jvp": lambda f, scalar, t: jvp(f, (t,), (t.sin(),))[1],
    "linearize": lambda f, scalar, t: linearize(f, t)[1](t.sin()),
    "hessian": lambda f, scalar, t: hessian(scalar)(t),
    "forward over reverse": lambda f, scalar, t: jvp(grad(scalar), (t,), (t.sin(),))[1],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize(("routed", "name"), CASES)
def test_transforms(transform, routed, name):
    operands, run, plain = case(routed)
    found, want = (
        transform(of(f, operands, name), loss(f, operands, name), operands[name]) for f in (run, plain)
    )
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-12)
    assert want.abs().max() > 0


def test_gradients_of_each_sample():
    operands, run, plain = case(True, tokens=(4, 3))
    names = ("A", "B", "router_weight", "router_bias")

    def of_sample(function):
        def sample(parameters, x, base):
            return function(**parameters, x=x, base=base).sin().sum()

        return vmap(grad(sample), in_dims=(None, 0, 0))

    parameters = {name: operands[name] for name in names}
    found, want = (of_sample(f)(parameters, operands["x"], operands["base"]) for f in (run, plain))
    for name in names:
        assert found[name].shape == (4, *operands[name].shape)
        torch.testing.assert_close(found[name], want[name], rtol=1e-10, atol=1e-12)


def test_functional_call_of_the_module_and_an_ensemble_of_it():
    torch.manual_seed(0)
    modules = [RectifiedMixture(6, 5, (1, 2), router_bias=True).double() for _ in range(3)]
    for module in modules:
        torch.nn.init.normal_(module.B)
    x = torch.randn(4, 6, dtype=torch.float64)
    stacked, _ = torch.func.stack_module_state(modules)
    found = vmap(lambda state: functional_call(modules[0], state, (x,)))(stacked)
    torch.testing.assert_close(found, torch.stack([module(x) for module in modules]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_follows_vmaps_randomness(randomness):
    operands, _, _ = case(True)
    p = random_problem((2, 3), K=6, O=5, ranks=(1, 3, 2), dtype=torch.float64)
    x = operands["x"].expand(50, 2, 3, 6)

    def run(x):
        return rectified_mixture(**{**operands, "x": x}, ranks=p.ranks, scaling=p.scaling, dropout_p=0.5)

    y = vmap(run, randomness=randomness)(x)
    assert (y == y[0]).all() == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(run)(x)


@pytest.mark.parametrize("gate_grad", ["open", "all"])
def test_closed_gates_reopen_only_where_asked(gate_grad):
    operands, _, _ = case(False)
    p = random_problem((2, 3), K=6, O=5, ranks=(1, 3, 2), router=False, dtype=torch.float64)
    gates = operands["gates"].clone()
    gates[0] = 0.0

    def run(gates):
        kwargs = dict(ranks=p.ranks, scaling=p.scaling, gate_grad=gate_grad)
        return gated_mixture(**{**operands, "gates": gates}, **kwargs).sin().sum()

    want = torch.autograd.grad(run(leaf := gates.clone().requires_grad_()), leaf)[0]
    torch.testing.assert_close(grad(run)(gates), want, rtol=1e-10, atol=1e-12)
    assert (want[0] != 0).any() == (gate_grad == "all")


@pytest.mark.parametrize("routed", [True, False])
@pytest.mark.parametrize("repeated", [False, True])
def test_second_derivatives(routed, repeated, backend):
    """By gradgradcheck, also where the call took the fast path."""
    operands, _, _ = case(routed)
    if backend not in ("cpu", "reference"):
        pytest.skip("takes no float64")
    p = random_problem((2, 3), K=6, O=5, ranks=(1, 3, 2), router=routed, dtype=torch.float64)
    function = rectified_mixture if routed else partial(gated_mixture, gate_grad="all")
    options = {} if repeated else {"seed": 3, "dropout_p": 0.4}

    def run(*tensors):
        arguments = dict(zip(operands, tensors, strict=True))
        return function(**arguments, ranks=p.ranks, scaling=p.scaling, backend=backend, **options)

    leaves = [t.clone().requires_grad_() for t in operands.values()]
    if repeated:
        run(*leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


def test_first_derivatives_have_the_kernels_bits_with_create_graph():
    p = random_problem((4, 7), dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (p.x, p.A, p.B, p.router_weight, p.router_bias)]

    def gradients(create_graph):
        y = rectified_mixture(p.x, p.A, p.B, p.router_weight, p.router_bias, ranks=p.ranks, scaling=p.scaling)
        return torch.autograd.grad(y, leaves, p.dy, create_graph=create_graph)

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


@pytest.mark.parametrize("name", ["x", "A", "B", "router_weight", "router_bias", "base"])
@pytest.mark.parametrize("remembered", [False, True])
def test_a_dual_tensor_has_its_tangent(name, remembered):
    operands, run, plain = case(True)
    if remembered:
        run(**operands)
    tangents = []
    with forward_ad.dual_level():
        for function in (run, plain):
            dual = forward_ad.make_dual(operands[name], operands[name].cos())
            tangents.append(forward_ad.unpack_dual(function(**{**operands, name: dual})).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_tangent_of_the_incoming_gradient(create_graph):
    operands, run, plain = case(True)
    tangents = []
    for function in (run, plain):
        x = operands["x"].clone().requires_grad_()
        y = function(**{**operands, "x": x})
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones_like(y), y.detach().cos())
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=create_graph)
            tangents.append(forward_ad.unpack_dual(dx).tangent.detach())
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)


def test_the_operators_by_themselves_refuse():
    p = random_problem((5,))
    static = (p.ranks, p.scaling, 0.0, False, "")
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(p.x.detach(), torch.ones_like(p.x))
        with pytest.raises(NotImplementedError, match="call the public functions"):
            torch.ops.rode.mixture(
                dual, p.A, p.B, p.router_weight, p.router_bias, None, p.base, None, *static
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trace_computes_the_same(dtype):
    p = random_problem((4, 7), dtype=dtype)

    def run(x, base):
        return rectified_mixture(
            x, p.A, p.B, p.router_weight, p.router_bias, base=base, ranks=p.ranks, scaling=p.scaling
        )

    traced = torch.jit.trace(run, (p.x, p.base))
    more = random_problem((3, 2), dtype=dtype, seed=1)
    error = (traced(more.x, more.base).double() - run(more.x, more.base).double()).abs().max()
    assert error <= 2 * torch.finfo(dtype).eps * run(more.x, more.base).abs().max()


def test_the_slower_way_is_said_once():
    operands, run, _ = case(True)
    say_once.cache_clear()
    with pytest.warns(
        UserWarning, match=r"a transform of torch.func.* takes plain PyTorch in place of the kernels"
    ):
        grad(loss(run, operands, "x"))(operands["x"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad(loss(run, operands, "x"))(operands["x"])


def test_the_formula_is_the_references(monkeypatch):
    """Values of the kernels and of the formula, in float32 with the same dropout mask."""
    p = random_problem((2, 5), dtype=torch.float32, dropout_p=0.3, dropout_seed=7)
    arguments = (p.x, p.A, p.B, p.router_weight, p.router_bias)
    options = dict(ranks=p.ranks, scaling=p.scaling, base=p.base, dropout_p=0.3, seed=7)
    want = rectified_mixture(*arguments, **options, backend="reference")
    found = vmap(lambda base: rectified_mixture(*arguments, **{**options, "base": base}))(p.base[None])
    torch.testing.assert_close(found[0], want)
    assert formula.needs_formula(p.x) is False


def test_within_a_dual_level_what_carries_no_tangent_runs_on_the_kernels():
    p = random_problem((5,))
    want = rectified_mixture(p.x, p.A, p.B, p.router_weight, ranks=p.ranks, scaling=p.scaling)
    with forward_ad.dual_level():
        found = rectified_mixture(p.x, p.A, p.B, p.router_weight, ranks=p.ranks, scaling=p.scaling)
    assert torch.equal(found, want)


def test_only_base_has_a_gradient():
    operands, run, _ = case(True)
    base = operands["base"].clone().requires_grad_()
    y = run(**{**operands, "base": base})
    (dbase,) = torch.autograd.grad(y, base, torch.ones_like(y), create_graph=True)
    assert torch.equal(dbase, torch.ones_like(base))
    with forward_ad.dual_level():
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        (dbase,) = torch.autograd.grad(run(**{**operands, "base": base}), base, dy)
        assert torch.equal(forward_ad.unpack_dual(dbase).tangent, torch.ones_like(base))


def test_second_derivatives_through_two_calls():
    """The gradient that reaches the first call was computed from what it gave."""
    operands, run, plain = case(True)
    found = []
    for function in (run, plain):
        x, A = operands["x"].clone().requires_grad_(), operands["A"].clone().requires_grad_()
        y = function(**{**operands, "x": x, "A": A})
        again = torch.cat((y, y[..., :1]), dim=-1).tanh()
        z = function(**{**operands, "x": again, "A": A})
        (dx,) = torch.autograd.grad(z.sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, A)))
    for mine, want in zip(*found, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-9, atol=1e-12)


def test_bad_input_is_refused_under_a_transform_too():
    operands, run, _ = case(True)
    base = operands.pop("base")
    with pytest.raises(ValueError, match="inplace=True: base is None"):
        grad(lambda x: run(**{**operands, "x": x}, inplace=True).sum())(operands["x"])
    with pytest.raises(ValueError, match="A: expected shape"):
        grad(lambda x: run(**{**operands, "x": x, "A": base}).sum())(operands["x"])


@pytest.mark.parametrize("gate_grad", ["open", "all"])
def test_a_closed_expert_whose_product_is_not_finite_adds_nothing(gate_grad):
    operands, _, _ = case(False)
    p = random_problem((2, 3), K=6, O=5, ranks=(1, 3, 2), router=False, dtype=torch.float64)
    operands["A"] = operands["A"].clone()
    operands["A"][0] = torch.inf
    operands["gates"] = operands["gates"].clone()
    operands["gates"][..., 0] = 0.0

    def run(base):
        kwargs = dict(ranks=p.ranks, scaling=p.scaling, gate_grad=gate_grad)
        return gated_mixture(**{**operands, "base": base}, **kwargs)

    torch.testing.assert_close(vmap(run)(operands["base"][None])[0], run(operands["base"]))
