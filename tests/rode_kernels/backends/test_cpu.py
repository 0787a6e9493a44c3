"""The CPU core alone: threads, instruction sets, large indices, and bits that do not depend on a token's company."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixture_oracle import DTYPES, MIXED, check, operation, random_problem, threads
from rode_kernels import backends, gated_mixture
from sibling_problems import check as check_siblings
from sibling_problems import random_siblings

TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_finite_x_of_a_closed_token_reaches_no_weight_on_a_cpu(dtype):
    """With most gates open the router's gradient is a product with closed ones' zeros, unless that is not finite."""
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
    """OpenMP gives fewer threads within another program's parallel region: all columns are computed all the same."""
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    program = """
import torch
from mixture_oracle import check, random_problem
torch.set_num_threads(4)
for tokens in (1, 60, 300):
    check(random_problem((tokens,), K=1024, O=1001, ranks=(64, 64)), backend="cpu")
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=dict(os.environ, OMP_THREAD_LIMIT="1", PYTHONPATH=str(TESTS / "support")),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
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


@pytest.fixture
def generic_code():
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    from rode_kernels import _native

    before = _native.isa()
    _native.set_isa("generic")
    yield
    _native.set_isa(before)


def test_siblings_add_nothing_for_tokens_without_an_open_expert(generic_code):
    """Generic code computes a chunk of dx in several tiles, many ranks an expert at a time: one tile's sums stayed in the next."""
    problems = random_siblings((141,), K=72, widths=(20, 24), ranks=((2, 3), (20,) * 6), dtype=torch.float32)
    check_siblings(problems, "cpu")


@pytest.mark.parametrize(
    "isa", ["avx2", *(pytest.param(isa, marks=pytest.mark.slow) for isa in ("generic", "avx512"))]
)
def test_other_instruction_sets(isa):
    """The same suite's core on the code paths that this processor would not pick."""
    env = dict(os.environ, RODE_CPU_ISA=isa, RODE_BACKEND="")
    probe = "import sys; from rode_kernels import backends; sys.exit(0 if backends()['cpu'].available else 5)"
    if subprocess.run([sys.executable, "-c", probe], env=env).returncode:
        pytest.skip(f"no {isa} code on this machine")
    shared = TESTS / "rode_kernels" / "test_functional.py"
    tests = [
        f"{shared}::test_parameter_dtypes",
        f"{shared}::test_random_problems",
        f"{shared}::test_strides",
        f"{TESTS / 'rode_kernels' / 'test_siblings.py'}::test_values_and_gradients",
        f"{TESTS / 'rode_kernels' / 'test_siblings.py'}::test_dropout",
        f"{TESTS / 'rode_kernels' / 'test_dropout.py'}::test_values_and_gradients",
        f"{TESTS / 'rode_kernels' / 'test_dropout.py'}::test_native_mask_follows_the_layout",
        f"{__file__}::test_cpu_threads_share_the_weights_of_few_tokens",
        f"{__file__}::test_cpu_bits_of_a_token_are_its_own",
        f"{__file__}::test_cpu_bits_of_a_token_are_its_own_where_experts_are_many",
    ]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "cpu or native_mask", "-p", "no:cacheprovider", *tests],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
