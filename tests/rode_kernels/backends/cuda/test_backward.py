"""The CUDA kernels of the backward pass on the emulator: every variant at the edges of its tiles, what is skipped, what moves."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch

from mixture_oracle import Problem, check, operation, random_problem, with_dropout
from rode_kernels import backends, gated_mixture, rectified_mixture
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.cuda.emulated import machine
from rode_kernels.backends.gpu.planner import plan_backward
from rode_kernels.backends.gpu.plans import BackwardPlan, ProblemShape
from rode_kernels.backends.reference import dropout_keep

if not backends()["cuda-emulated"].available:
    if os.environ.get("RODE_EMULATE") == "1":
        raise RuntimeError(backends()["cuda-emulated"].reason)
    pytest.skip(backends()["cuda-emulated"].reason, allow_module_level=True)
emulator = cuda_emulated.native
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# float16 has the layout of bfloat16; the quick tests have all three
LONG_DTYPES = (torch.float32, torch.bfloat16)
NAMES = ["x", "A", "B", "router_weight", "router_bias"]


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    machine.seed, machine.multiprocessors, machine.backward_plan, machine.gemm_path = 0, 2, None, None


def sweep(
    dtype: torch.dtype, *, M: int, K: int, O: int, dropout: bool = False, seed: int = 0, **rest
) -> None:
    """The most and the fewest ranges of tokens and tiles of O that M and O allow."""
    p = random_problem((M,), K=K, O=O, dtype=dtype, seed=seed, **rest)
    if dropout:
        p = with_dropout(p, dropout_keep(torch.tensor([7]), 0.3, M, K), 0.3, 7)
    machine.gemm_path = False
    for machine.seed, many in ((seed, False), (seed + 1, True)):
        machine.backward_plan = None
        if many:
            routed = p.router_weight is not None
            call = ProblemShape(M, K, O, sum(p.ranks), len(p.ranks), dtype.itemsize, routed=routed)
            plan = plan_backward(call, 1)
            depth = 128 // dtype.itemsize
            machine.backward_plan = replace(
                plan,
                o_tiles=-(-O // depth),
                o_tile_columns=depth,
                tokens_per_split_y=16,
                tokens_per_split_x=64,
                tokens_per_split_dx=64,
            )
        check(p, backend="cuda-emulated")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
@pytest.mark.parametrize(
    ("M", "K", "O", "ranks"),
    [
        (1, 64, 64, (2, 4, 8, 16)),
        (17, 264, 129, (2, 4, 8, 16)),
        (65, 33, 200, (3,)),
        (80, 72, 800, (40, 24)),
        (130, 136, 72, (16, 40, 50)),
        (18, 40, 40, (1,) * 40),
    ],
)
def test_edges(dtype, router, M, K, O, ranks):
    sweep(dtype, M=M, K=K, O=O, ranks=ranks, router=router, dropout=M % 2 == 1, seed=M)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [False, True])
def test_sweep_of_many_columns(dtype, dropout):
    """K and O over whole, ragged and odd tiles; M around the edges of both tiles; all numbers of stages on their way."""
    depth = 128 // dtype.itemsize
    for K, O in product(
        (1, 8, depth - 1, 2 * depth, 2 * depth + 8, 5 * depth), (1, depth + 4, 12 * depth + 1)
    ):
        for M in (1, 16, 33, 63, 64, 129, 260):
            sweep(dtype, M=M, K=K, O=O, dropout=dropout, seed=K + M)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_many_columns(dtype, dropout, router):
    for ranks in [
        (1,),
        (9,),
        (32,),
        (33,),
        (64,),
        (7,) * 9,
        (1,) * 64,
        (16,) * 16,
        (65, 95),
        (500, 524),
        (16,) * 64,
    ]:
        for M in (3, 130):
            sweep(dtype, M=M, K=136, O=136, ranks=ranks, router=router, dropout=dropout, seed=M)


def call(
    p: Problem,
    backend: str = "cuda-emulated",
    dy: torch.Tensor | None = None,
    wanted: list[str] = NAMES,
    **kwargs,
):
    """The gradients of `wanted`."""
    leaves = {n: getattr(p, n).detach().requires_grad_(n in wanted) for n in NAMES}
    kwargs = {"ranks": p.ranks, "scaling": p.scaling, "backend": backend, **kwargs}
    y = rectified_mixture(*leaves.values(), **kwargs)
    grads = torch.autograd.grad(y, [leaves[n] for n in wanted], p.dy if dy is None else dy)
    return dict(zip(wanted, grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_the_order_of_warps_and_blocks(dtype):
    p = random_problem((150,), K=200, O=160, dtype=dtype)
    machine.multiprocessors = 6
    results = []
    for machine.seed in range(5):
        results.append(call(p, dropout_p=0.2, seed=3))
    for other in results[1:]:
        assert all(torch.equal(results[0][n], other[n]) for n in NAMES)


@pytest.mark.parametrize("wanted", [[n] for n in NAMES] + [["x", "B"], ["A", "router_bias"]], ids="+".join)
def test_gradients_that_are_asked_for_alone_have_the_same_bits_and_cost_no_other(wanted):
    p = random_problem((70,), K=128, O=96, dtype=torch.bfloat16)
    everything = call(p)
    some = call(p, wanted=wanted)
    assert all(torch.equal(some[n], everything[n]) for n in wanted)
    kernels = [launch["kernel"] for launch in emulator.launches()]
    if wanted == ["B"]:
        assert kernels == ["grad_output_pass", "reduce_partials"]
    elif wanted == ["router_bias"]:
        assert kernels == ["grad_output_pass", "gate_backward", "reduce_partials"]
    elif wanted == ["x"]:
        assert kernels == ["grad_output_pass", "gate_backward", "grad_input_pass"]
    else:
        assert kernels == ["grad_output_pass", "gate_backward", "grad_input_pass", "reduce_partials"]
    if not {"A", "router_weight"} & set(wanted):
        assert loads(p.x) == 0
    if wanted == ["B"]:
        assert loads(p.B) == 0


def loads(t: torch.Tensor) -> int:
    try:
        return emulator.traffic(t.data_ptr())[0]["bytes"]
    except KeyError:  # no kernel was given it
        return 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_of_dy(dtype):
    """Transposed, expanded along tokens, along columns, or both (the gradient of a sum), sliced: the bits of a contiguous one."""
    p = random_problem((40,), K=64, O=72, dtype=dtype)
    one = torch.full((), 0.5, dtype=dtype)
    for dy in (
        p.dy.t().contiguous().t(),
        p.dy[:1].expand(40, 72),
        p.dy[:, :1].expand(40, 72),
        one.expand(40, 72),
        torch.cat([p.dy, p.dy], 1)[:, 3:75],
        torch.cat([p.dy, p.dy], 1)[:, ::2],
    ):
        strided, plain = call(p, dy=dy), call(p, dy=dy.contiguous())
        assert all(torch.equal(strided[n], plain[n]) for n in NAMES), dy.stride()


def closed_but_for(tokens: list[int], M: int, dtype: torch.dtype = torch.bfloat16) -> Problem:
    """The logits of these tokens are positive, those of all others negative, for every expert."""
    p = random_problem((M,), K=64, O=192, dtype=dtype)
    p.router_bias.zero_()
    p.x[:, 0], p.x[tokens, 0] = -20.0, 20.0
    p.router_weight[:, 0] = 1.0
    return p


def test_tiles_with_nothing_open_are_not_read():
    p = closed_but_for([70, 72], 200)
    grads = call(p)
    row = 2
    assert loads(p.dy) == 16 * 192 * row  # 16 tokens
    assert loads(p.x) == 64 * 64 * row  # 64
    others = torch.ones(200, dtype=torch.bool)
    others[[70, 72]] = False
    assert (grads["x"][others] == 0).all()
    assert (grads["x"][[70, 72]] != 0).any(1).all()
    p = closed_but_for([], 200)
    grads = call(p)
    assert loads(p.dy) == loads(p.x) == 0
    assert all((grads[n] == 0).all() for n in NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closed_pairs_skip_their_steps(dtype):
    """Each of two experts of rank 16 has half of t's and dB's columns, whose operands are then not read."""
    reads = {}
    for name, bias in (
        ("both", (1e9, 1e9)),
        ("first", (1e9, -1e9)),
        ("second", (-1e9, 1e9)),
        ("none", (-1e9, -1e9)),
    ):
        p = random_problem((64,), K=64, O=256, ranks=(16, 16), dtype=dtype)
        p.router_bias.copy_(torch.tensor(bias))
        call(p)
        reads[name] = emulator.shared_traffic()[0]["phases"]
    assert reads["first"] == reads["second"] < reads["both"]
    assert reads["none"] < reads["first"] / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(2, 4, 8, 16), (40, 24), (60, 60)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_no_bank_conflicts(dtype, ranks, dropout_p):
    call(random_problem((64,), K=512, O=832, dtype=dtype, ranks=ranks), dropout_p=dropout_p, seed=1)
    loaded, stored = emulator.shared_traffic()
    assert (loaded["conflicts"], stored["conflicts"]) == (0, 0)


def test_launches():
    """Three and the one that adds ranges; one more where float32 parameters meet 16-bit activations; none without tokens."""

    def kernels(**problem):
        call(random_problem(**{"K": 128, "O": 128, "dtype": torch.bfloat16, **problem}))
        return [launch["kernel"] for launch in emulator.launches()]

    four = ["grad_output_pass", "gate_backward", "grad_input_pass", "reduce_partials"]
    assert kernels(tokens=(128,)) == kernels(tokens=(1,)) == kernels(tokens=(64,), ranks=(128,)) == four
    assert kernels(tokens=(128,), parameter_dtype=torch.float32) == ["pack_parameters", *four]
    assert kernels(tokens=(0,)) == []


def test_a_large_share_fits_what_a_block_can_note():
    """A device of few multiprocessors, 2^20 tokens: ranges are no longer than shared memory has room for, whatever the kernels."""
    for M, R, N, size in product((1, 2**20), (4, 30, 64, 1024), (0, 4, 64), (2, 4)):
        plan = plan_backward(ProblemShape(M, 4096, 4096, R, max(N, 1), size, routed=N > 0), 1)
        assert isinstance(plan, BackwardPlan)
        assert plan.tokens_per_split_y % 16 == plan.tokens_per_split_x % 64 == 0
        assert plan.tokens_per_split_y <= 16 * 1536
        assert plan.tokens_per_split_x <= 64 * 512
        assert plan.o_tiles * plan.o_tile_columns >= 4096 > (plan.o_tiles - 1) * plan.o_tile_columns


def test_long_sums_over_tokens_keep_their_accuracy_in_float32():
    p = random_problem((3000,), K=8, O=8, ranks=(3,), open_share=1.0)
    machine.multiprocessors = 1
    check(p, backend="cuda-emulated")


def test_gates_that_may_reopen_get_their_gradient_where_they_are_closed():
    p = random_problem((40,), K=48, O=56, router=False, dtype=torch.bfloat16)
    gates = {}
    for backend in ("cuda-emulated", "reference"):
        leaf = p.gates.clone().requires_grad_()
        y = gated_mixture(
            p.x, p.A, p.B, leaf, ranks=p.ranks, scaling=p.scaling, gate_grad="all", backend=backend
        )
        (gates[backend],) = torch.autograd.grad(y, leaf, p.dy)
    closed = p.gates == 0
    assert closed.any()
    assert (gates["cuda-emulated"][closed] != 0).all()
    error = (gates["cuda-emulated"] - gates["reference"]).abs().max() / gates["reference"].abs().max()
    assert error < 2**-7
    assert operation(p, backend="cuda-emulated") is not None
