"""Conformance: values and gradients of both entry points against float64, at every edge of the contract."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixture_oracle import ON_GPUS, check, operation, oracle, random_problem
from rode_kernels import backends, gated_mixture, rectified_mixture

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
MIXED = [(d, None) for d in DTYPES] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_x_of_a_closed_token_reaches_no_weight_on_a_cpu(dtype):
    """Where most gates are open the router's gradient is a product with closed ones' zeros, unless that is not finite."""
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    p = random_problem((20,), dtype=dtype, dgates=False)
    p.router_bias += 3.0
    p.router_weight[:, 1] = -1.0
    p.x[3, 1] = float("inf")  # every logit of token 3 is -inf
    dirty = operation(p, backend="cpu")
    assert torch.equal(dirty.gates[3], torch.zeros_like(dirty.gates[3]))
    assert (dirty.gates > 0).double().mean() > 0.5
    p.x[3, 1] = 0.0
    p.dy[3] = 0.0  # the token takes part, and adds nothing
    clean = operation(p, backend="cpu")
    for name in ("A", "B", "router_weight"):
        assert torch.equal(dirty.grads[name], clean.grads[name]), name


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


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_bits_do_not_depend_on_threads_or_run(backend, router):
    if backend == "reference":
        pytest.skip("plain PyTorch makes no such promise")
    for tokens in (200,) if backend in ON_GPUS else (0, 3, 70, 700):  # GPU code on a CPU is slow
        p = random_problem((tokens,), K=300, O=260, router=router, dropout_p=0.1, dropout_seed=3)
        results = []
        for count in (1, 2, 5, 5):
            with threads(count):
                results.append(operation(p, backend=backend))
        for other in results[1:]:
            assert torch.equal(other.y, results[0].y)
            for name, grad in results[0].grads.items():
                assert torch.equal(grad, other.grads[name]), name


@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("tokens", [1, 7])
def test_cpu_threads_share_the_weights_of_few_tokens(tokens, dtype, parameter_dtype):
    """Each takes some of the ranks, whosever experts they are, and then some columns: values, and the same bits as one thread's."""
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    for options in (
        dict(open_share=0.2),
        dict(dropout_p=0.3, dropout_seed=5),
        dict(router=False, gate_grad="all"),
    ):
        p = random_problem(
            (tokens,),
            K=1024,
            O=1001,
            ranks=(3, 1, 40, 65, 5, 100),
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            **options,
        )
        results = []
        for count in (1, 2, 4):
            with threads(count):
                results.append(operation(p, backend="cpu") if p.dropout_p else check(p, backend="cpu"))
        for other in results[1:]:
            assert torch.equal(other.y, results[0].y)
            for name, grad in results[0].grads.items():
                assert torch.equal(grad, other.grads[name]), name


@pytest.mark.parametrize("tokens", [1, 5])
def test_closed_in_place_keeps_the_sign_of_zero(tokens):
    """Nothing is added where all gates are closed, not even a zero, however many tokens there are."""
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    base = torch.full((tokens, 77), -0.0)
    x, A, B = torch.randn(tokens, 50), torch.randn(6, 50), torch.randn(77, 6)
    gates = torch.zeros(tokens, 2)
    gated_mixture(x, A, B, gates, ranks=(2, 4), scaling=(1.0, 1.0), base=base, inplace=True, backend="cpu")
    assert base.signbit().all()


def test_cpu_single_token_on_a_strided_base():
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    p = random_problem((1,), K=50, O=77, open_share=1.0)
    p.base = torch.stack([p.base, p.base], dim=-1)[..., 0]
    assert p.base.stride(-1) == 2
    check(p, backend="cpu")


def test_cpu_with_fewer_threads_than_it_asks_for():
    """As within another program's parallel region: nobody's share may be lost."""
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    program = """
import torch
from mixture_oracle import check, random_problem
torch.set_num_threads(4)
for tokens in (1, 60, 300):
    check(random_problem((tokens,), K=1024, O=1001, ranks=(64, 64)), backend="cpu")
"""
    support = Path(__file__).parents[1] / "support"
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, OMP_THREAD_LIMIT="1", PYTHONPATH=str(support)),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_problems(backend, data):
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


def test_index_arithmetic_past_two_to_the_31():
    """x of more than 2^31 elements without the memory (one row, expanded), and an output of as many."""
    native = pytest.importorskip("rode_kernels._native")
    K, M = 2**17, 2**14 + 3
    row = torch.randn(1, K, generator=torch.Generator().manual_seed(0))
    x = row.expand(M, K)
    assert x.numel() > 2**31
    A, B = torch.randn(1, K) / K**0.5, torch.randn(1, 1)
    gates = torch.zeros(M, 1)
    gates[[0, M - 1]] = 1.0
    kwargs = dict(ranks=(1,), scaling=(1.0,), backend="cpu", dropout_p=0.5, seed=9)
    y = gated_mixture(x, A, B, gates, **kwargs)
    assert (y[1:-1] == 0).all()
    for m in (0, M - 1):
        keep = torch.tensor(native.keep_mask(9, 0.5, m * K, K))
        want = (row.double() * keep.double() * 2) @ A.double().t() @ B.double().t()
        torch.testing.assert_close(y[m].double(), want[0], rtol=1e-4, atol=1e-5)
    base = torch.zeros(2**11 + 1, 2**20, dtype=torch.bfloat16)
    gates = torch.zeros(2**11 + 1, 1)
    gates[-1] = 1.0
    B = torch.ones(2**20, 1, dtype=torch.bfloat16)
    A = torch.ones(1, 1, dtype=torch.bfloat16)
    ones = torch.ones(2**11 + 1, 1, dtype=torch.bfloat16)
    gated_mixture(ones, A, B, gates, ranks=(1,), scaling=(3.0,), base=base, inplace=True, backend="cpu")
    assert (base[-1] == 3).all()
    assert (base[0] == 0).all()
    assert (base[-2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [(2, 1, 3, 4), (5,) * 7])
def test_cpu_bits_of_a_token_are_its_own(dtype, ranks):
    """Tokens with the same open experts are computed together: that decides about speed, and not about a bit."""
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    torch.manual_seed(0)
    tokens, K, O, N = 37, 70, 301, len(ranks)
    x, A = torch.randn(tokens, K).to(dtype), torch.randn(sum(ranks), K)
    B, base = torch.randn(O, sum(ranks)), torch.randn(tokens, O).to(dtype)
    acc_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    patterns = torch.rand(3, N) < 0.5
    gates = (torch.rand(tokens, N) + 0.1) * patterns[torch.arange(tokens) % 3]
    A, B, gates = A.to(acc_dtype), B.to(acc_dtype), gates.to(acc_dtype)
    options = {"ranks": ranks, "scaling": [0.5 + i for i in range(N)], "backend": "cpu"}
    y = gated_mixture(x, A, B, gates, base=base, **options)
    for m in range(tokens):
        alone = gated_mixture(x[m : m + 1], A, B, gates[m : m + 1], base=base[m : m + 1], **options)
        assert torch.equal(alone[0], y[m])
    v = torch.cat(
        [
            s * g[:, None] * x.double() @ part.T.to(dtype).double()
            for s, g, part in zip(options["scaling"], gates.double().T, A.split(ranks), strict=True)
        ],
        dim=1,
    )
    want = base.double() + v.to(dtype).double() @ B.to(dtype).double().T
    plain = base + (v.to(dtype) @ B.to(dtype).T)
    error, bound = (y.double() - want).abs().max(), (plain.double() - want).abs().max()
    assert error <= 2 * bound + 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_bits_of_a_token_are_its_own_where_experts_are_many(dtype):
    """More ranks than fit a cache, hardly two tokens alike, long rows: together they go an expert at a time, alone they do not."""
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    torch.manual_seed(0)
    ranks, tokens, K, O = (16,) * 12 + (5,), 70, 1100, 150
    x, dy = torch.randn(tokens, K).to(dtype), torch.randn(tokens, O).to(dtype)
    A, B = torch.randn(sum(ranks), K) / K**0.5, torch.randn(O, sum(ranks))
    gates = (torch.rand(tokens, 13) + 0.1) * (torch.rand(tokens, 13) < 0.4)
    options = {"ranks": ranks, "scaling": [1.0] * 13, "backend": "cpu"}

    def run(rows: slice, backend: str = "cpu"):
        leaf = x[rows].clone().requires_grad_()
        y = gated_mixture(leaf, A, B, gates[rows], **(options | {"backend": backend}))
        return y.detach(), torch.autograd.grad(y, leaf, dy[rows])[0]

    together, plain = run(slice(None)), run(slice(None), "reference")
    for m in range(tokens):
        for whole, alone in zip(together, run(slice(m, m + 1)), strict=True):
            assert torch.equal(whole[m], alone[0])
    for have, want in zip(
        together, plain, strict=True
    ):  # against sums of the same dtype in another order: a wrong one is far off
        scale = want.double().abs().max()
        assert (have.double() - want.double()).abs().max() <= 16 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_other_instruction_sets(isa):
    """The same suite's core on the code paths that this processor would not pick."""
    env = dict(os.environ, RODE_CPU_ISA=isa, RODE_BACKEND="")
    probe = "import sys; from rode_kernels import backends; sys.exit(0 if backends()['cpu'].available else 5)"
    if subprocess.run([sys.executable, "-c", probe], env=env).returncode:
        pytest.skip(f"no {isa} code on this machine")
    tests = [
        f"{__file__}::test_parameter_dtypes",
        f"{__file__}::test_random_problems",
        f"{__file__}::test_strides",
        f"{__file__}::test_cpu_threads_share_the_weights_of_few_tokens",
        f"{__file__}::test_cpu_bits_of_a_token_are_its_own",
        f"{__file__}::test_cpu_bits_of_a_token_are_its_own_where_experts_are_many",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "cpu", "-p", "no:cacheprovider", *tests],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
