"""Conformance: values and gradients of both entry points against float64, at every edge of the contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixture_oracle import DTYPES, MIXED, ON_GPUS, check, operation, oracle, random_problem, threads
from rode_kernels import gated_mixture, rectified_mixture

SHAPES = {
    "zero tokens": dict(tokens=(0,)),
    "one token": dict(tokens=(1,)),
    "three leading dimensions": dict(tokens=(2, 3, 5)),
    "no leading dimension": dict(tokens=()),
    "one expert": dict(ranks=(8,)),
    "rank 1": dict(ranks=(1,)),
    "odd ranks": dict(ranks=(3, 1, 7, 5), tokens=(33,)),
    "64 experts": dict(ranks=(2,) * 64, tokens=(19,)),
    "R = 1000": dict(ranks=(500, 300, 200), tokens=(9,), K=64, O=48),
    "all closed": dict(open_share=0.0),
    "all open": dict(open_share=1.0),
    "all open, wider than a unit": dict(open_share=1.0, K=300, O=260, tokens=(301,)),
    "many experts, few open": dict(ranks=(16,) * 16, open_share=0.1, K=70, O=200, tokens=(150,)),
    "K = 1": dict(K=1),
    "O = 1": dict(O=1),
    "K and O odd": dict(K=101, O=77, tokens=(45,)),
    "wider than a chunk": dict(K=300, O=519, tokens=(40,)),
    "more tokens than a sum": dict(tokens=(530,), K=70, O=130),
    "no base": dict(base=False),
    "no bias": dict(bias=False),
    "negative, large and tiny ranks apart": dict(ranks=(64, 1, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(backend, shape, router, dtype):
    check(random_problem(dtype=dtype, router=router, **SHAPES[shape]), backend=backend)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_parameter_dtypes(backend, router, dtype, parameter_dtype):
    p = random_problem((64,), K=96, O=80, dtype=dtype, parameter_dtype=parameter_dtype, router=router)
    check(p, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_grad_all_reaches_closed_gates(backend, dtype):
    p = random_problem((40,), router=False, gate_grad="all", dtype=dtype, open_share=0.3)
    result = check(p, backend=backend)
    assert (result.grads["gates"][p.gates == 0] != 0).all()


def test_gate_grad_open_is_zero_where_closed(backend):
    p = random_problem((40,), router=False, open_share=0.3)
    result = check(p, backend=backend)
    assert (result.grads["gates"][p.gates == 0] == 0).all()


def test_closed_gates_give_exact_zeros(backend):
    p = random_problem((50,), base=False, open_share=0.5, dgates=False)
    p.router_bias[1] = -1e9
    result = operation(p, backend=backend)
    rows = slice(p.ranks[0], p.ranks[0] + p.ranks[1])
    assert (result.gates[:, 1] == 0).all()
    assert (result.grads["A"][rows] == 0).all()
    assert (result.grads["B"][:, rows] == 0).all()
    assert (result.grads["router_weight"][1] == 0).all()
    assert result.grads["router_bias"][1] == 0


def test_all_closed_leaves_base_untouched(backend):
    p = random_problem((50,))
    p.router_bias.fill_(-1e9)
    result = operation(p, backend=backend)
    assert torch.equal(result.y, p.base)
    assert all((g == 0).all() for n, g in result.grads.items() if n != "base")


@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "reversed leading dimensions"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides(backend, layout, dtype):
    p = random_problem((6, 8), K=24, O=20, dtype=dtype)

    def restride(t):
        if layout == "transposed":  # last dimension is not the fast one
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "sliced":
            return torch.cat([t, t], -1)[..., : t.shape[-1]]
        if layout == "expanded":
            return t[:1].expand_as(t)
        return t.transpose(0, 1).contiguous().transpose(0, 1)

    for name in ("x", "base", "dy"):
        setattr(p, name, restride(getattr(p, name)))
    p.A = p.A.t().contiguous().t()
    p.B = p.B.t().contiguous().t()
    check(p, backend=backend)


def test_expanded_scalar_gradient(backend):
    """The gradient of sum() has stride 0 everywhere."""
    p = random_problem((30,), dgates=False)
    p.dy = torch.ones(()).expand(30, 20)
    check(p, backend=backend)


@pytest.mark.parametrize("needs", ["x", "A", "B", "router_weight", "router_bias", "base", "gates"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_partial_gradients_equal_full_ones(backend, needs, dropout):
    p = random_problem((30,), router=needs != "gates", dropout_p=dropout, dropout_seed=5)
    full, part = operation(p, backend=backend), operation(p, backend=backend, needs=(needs,))
    assert torch.equal(part.grads[needs], full.grads[needs])


def test_gradient_of_gates_alone(backend):
    p = random_problem((30,))
    leaves = {n: t.clone().requires_grad_() for n, t in p.tensors.items() if n != "base"}
    _, g = rectified_mixture(
        *leaves.values(), ranks=p.ranks, scaling=p.scaling, return_gates=True, backend=backend
    )
    dx, dWr = torch.autograd.grad(g, [leaves["x"], leaves["router_weight"]], p.dgates)
    dh = p.dgates.double() * (g > 0)
    torch.testing.assert_close(dx.double(), dh @ p.router_weight.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dWr.double(), dh.t() @ p.x.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_values_of_closed_experts_reach_nothing(backend, value):
    """u_i, t_i of a closed expert may be anything: select, never multiplication with 0."""
    p = random_problem((20,), dgates=False)
    p.router_bias[2] = -1e9
    rows = slice(sum(p.ranks[:2]), sum(p.ranks[:3]))
    clean = operation(p, backend=backend)
    p.A[rows] = value
    if (
        backend in ON_GPUS
    ):  # other experts and tokens share a step of a product with B, and with A in dx (docs/cuda.md)
        assert torch.equal(clean.y, operation(p, backend=backend).y)
        return
    p.B[:, rows] = value
    dirty = operation(p, backend=backend)
    assert torch.equal(clean.y, dirty.y)
    for name, grad in clean.grads.items():
        assert torch.equal(grad, dirty.grads[name]), name


def test_non_finite_dy_reaches_only_its_own_token(backend):
    p = random_problem((20,), dgates=False)
    clean = operation(p, backend=backend)
    p.dy[3] = float("nan")
    dirty = operation(p, backend=backend)
    others = torch.arange(20) != 3
    assert torch.equal(clean.grads["x"][others], dirty.grads["x"][others])


def test_nan_input_is_not_swallowed(backend):
    p = random_problem((4,))
    p.x[1, 2] = float("nan")
    y = operation(p, backend=backend).y
    assert y[1].isnan().all()
    assert y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("gate_grad", ["open", "all"])
def test_a_given_gate_that_is_nan_is_not_taken_for_closed(backend, gate_grad):
    p = random_problem((5,))
    gates = torch.rand(5, len(p.ranks), dtype=p.x.dtype)
    gates[2, 0], gates[2, 1] = float("nan"), 0.0
    x, gates = p.x.clone().requires_grad_(), gates.requires_grad_()
    y = gated_mixture(
        x, p.A, p.B, gates, ranks=p.ranks, scaling=p.scaling, gate_grad=gate_grad, backend=backend
    )
    y.sum().backward()
    others = torch.arange(5) != 2
    for t in (y, x.grad):
        assert t[2].isnan().all()
        assert t[others].isfinite().all()
    assert gates.grad.isfinite().all()  # a gate's own gradient does not depend on its value


def test_token_bits_do_not_depend_on_company(backend):
    """A token's result has the same bits alone as among others: batching does not change an answer."""
    if backend == "reference":
        pytest.skip("plain PyTorch picks its matrix product by shape")
    if backend in ON_GPUS:
        pytest.skip("fewer tokens share K out among more blocks, which add in another order")
    p = random_problem((300,), K=50, O=300, dtype=torch.bfloat16)

    def run(some):
        x = p.x[some].clone().requires_grad_()
        weights = (p.A, p.B, p.router_weight, p.router_bias)
        y = rectified_mixture(
            x, *weights, base=p.base[some], ranks=p.ranks, scaling=p.scaling, backend=backend
        )
        return y.detach(), *torch.autograd.grad(y, x, p.dy[some])

    whole = run(slice(None))
    for some in (slice(0, 1), slice(5, 7), slice(31, 37), slice(210, 300)):
        assert all(torch.equal(part, of[some]) for part, of in zip(run(some), whole, strict=True))


@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_bits_do_not_depend_on_threads_or_run(backend, router):
    if backend == "reference":
        pytest.skip("plain PyTorch makes no such promise")
    # GPU code on a CPU is slow, and Triton's interpreter slower
    for tokens in {"triton": (70,), "cuda-emulated": (200,)}.get(backend, (0, 3, 70, 700)):
        p = random_problem((tokens,), K=300, O=260, router=router, dropout_p=0.1, dropout_seed=3)
        results = []
        for count in (1, 2, 5, 5):
            with threads(count):
                results.append(operation(p, backend=backend))
        for other in results[1:]:
            assert torch.equal(other.y, results[0].y)
            for name, grad in results[0].grads.items():
                assert torch.equal(grad, other.grads[name]), name


def test_random_problems(backend):
    examples = (
        15 if backend == "triton" else 60
    )  # its interpreter takes a second for what others take milliseconds for
    settings(max_examples=examples, deadline=None)(given(data=st.data())(_is_right))(backend=backend)


def _is_right(backend, data):
    lead = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=2), label="tokens")
    ranks = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=8), label="ranks")
    mixed = [m for m in MIXED if m[0] != torch.float64 or backend not in ON_GPUS]
    dtype, parameter_dtype = data.draw(st.sampled_from(mixed), label="dtypes")
    p = random_problem(
        tuple(lead),
        K=data.draw(st.integers(1, 150), label="K"),
        O=data.draw(st.integers(1, 150), label="O"),
        ranks=tuple(ranks),
        dtype=dtype,
        parameter_dtype=parameter_dtype,
        router=data.draw(st.booleans(), label="router"),
        base=data.draw(st.booleans(), label="base"),
        bias=data.draw(st.booleans(), label="bias"),
        open_share=data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]), label="open"),
        seed=data.draw(st.integers(0, 10**6), label="seed"),
    )
    inplace = p.base is not None and data.draw(st.booleans(), label="inplace")
    with threads(data.draw(st.sampled_from([1, 2, 3]), label="threads") if backend == "cpu" else 1):
        check(p, backend=backend, inplace=inplace)


def test_gates_broadcast(backend):
    p = random_problem((3, 5), router=False)
    for shape in [(4,), (1, 4), (5, 4), (3, 1, 4), (1, 1, 4)]:
        p.gates = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        check(p, backend=backend)


@pytest.mark.parametrize("gates_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gates_of_another_dtype(backend, gates_dtype):
    p = random_problem((30,), router=False, dtype=torch.bfloat16)
    gates = p.gates.to(gates_dtype).requires_grad_()
    y = gated_mixture(p.x, p.A, p.B, gates, ranks=p.ranks, scaling=p.scaling, base=p.base, backend=backend)
    p.gates = gates.detach()
    truth = oracle(p)
    assert (y.double() - truth.y).abs().max() <= 2 * 2**-8 * truth.y.abs().max()
    (grad,) = torch.autograd.grad(y, gates, p.dy)
    assert grad.dtype == gates_dtype
    assert (grad.double() - truth.grads["gates"]).abs().max() <= 2**-6 * truth.grads["gates"].abs().max()
