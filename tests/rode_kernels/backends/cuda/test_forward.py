"""The CUDA kernels on the emulator: every variant at the edges of its tiles, what is skipped, what moves; the host side of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from mixture_oracle import Problem, check, oracle, random_problem, with_dropout
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.cuda.emulated import machine
from rode_kernels.backends.gpu.layout import beyond_kernels
from rode_kernels.backends.gpu.plans import Plan, ProblemShape
from rode_kernels.backends.reference import dropout_keep
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import ForwardOperands, Settings

if not backends()["cuda-emulated"].available:
    if os.environ.get("RODE_EMULATE") == "1":
        raise RuntimeError(backends()["cuda-emulated"].reason)
    pytest.skip(backends()["cuda-emulated"].reason, allow_module_level=True)
emulator = cuda_emulated.native

FUSED = Plan(fused=True, rows=64, splits=1, out_tiles=1)
TWO = Plan(fused=False, rows=64, splits=2, out_tiles=2)
DECODE = Plan(fused=False, rows=16, splits=3, out_tiles=1)
PLANS = {"fused": FUSED, "two launches": TWO, "decoding": DECODE}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# float16 has the layout of bfloat16; the quick tests have all three
LONG_DTYPES = (torch.float32, torch.bfloat16)
SEEDS = range(5)


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    machine.seed, machine.plan, machine.multiprocessors, machine.gemm_path = 0, None, 2, None


def run(p: Problem, **kwargs) -> torch.Tensor:
    return rectified_mixture(
        *(p.x, p.A, p.B, p.router_weight, p.router_bias),
        **{"ranks": p.ranks, "scaling": p.scaling, "base": p.base, "backend": "cuda-emulated", **kwargs},
    )


def sweep(
    plan: Plan, dtype: torch.dtype, *, M: int, K: int, O: int, dropout: bool = False, seed: int = 0, **rest
):
    machine.plan, machine.seed = plan, seed
    p = random_problem((M,), K=K, O=O, dtype=dtype, **rest)
    if dropout:
        p = with_dropout(p, dropout_keep(torch.tensor([7]), 0.3, M, K), 0.3, 7)
    check(p, backend="cuda-emulated", inplace=bool(M % 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("M", "K", "O"), [(1, 64, 64), (16, 33, 200), (17, 264, 129), (65, 392, 72), (128, 520, 96)]
)
def test_edges(plan, dtype, M, K, O):
    sweep(PLANS[plan], dtype, M=M, K=K, O=O, dropout=M == 17, seed=M)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep_v", [True, False], ids=["kept", "again"])
def test_v_of_several_passes_is_kept_or_made_again(keep_v, dtype):
    plan = Plan(fused=False, rows=64, splits=2, out_tiles=2, keep_v=keep_v)
    sweep(plan, dtype, M=65, K=136, O=264, ranks=(16, 40, 34), dropout=True, seed=keep_v)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dropout", [False, True])
def test_sweep_of_many_columns(plan, dtype, dropout):
    """K tiles over 1..2 x stages, whole, ragged and one short; M around the edges of both tiles; O around a tile's."""
    depth = 128 // dtype.itemsize
    for stages in range(1, 9):
        for K in (stages * depth, stages * depth - 1, stages * depth - depth // 2 + 8):
            for M in (1, 15, 16, 17, 63, 64, 65, 129) if K % depth == 0 else (5, 65):
                sweep(PLANS[plan], dtype, M=M, K=K, O=depth + M % 3 * 4, dropout=dropout, seed=K + M)
    for O in (1, 8, depth - 1, depth, depth + 1, 2 * depth + 8, 5 * depth):
        sweep(PLANS[plan], dtype, M=40, K=80, O=O, dropout=dropout, seed=O)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
def test_many_columns(dtype):
    """Every width of v, and routers of up to 64 experts, by the kernels that take them."""
    for ranks in [
        (1,),
        (9,),
        (3, 5),
        (30, 3),
        (64,),
        (7,) * 9,
        (1,) * 64,
        (16,) * 16,
        (33, 95),
        (500, 524),
        (16,) * 64,
    ]:
        for M in (3, 70):
            for splits in (1, 4):
                again = Plan(fused=False, rows=64, splits=splits, out_tiles=1)
                keeping = replace(again, keep_v=True)
                columns, size = sum(ranks), dtype.itemsize
                call = ProblemShape(M, 136, 136, columns, len(ranks), size, dropout=splits == 4)
                fits = columns * size > 128 and machine.memory.fits(call, keeping)
                for plan in (again, keeping) if fits else (again,):
                    sweep(plan, dtype, M=M, K=136, O=136, ranks=ranks, dropout=splits == 4, seed=M)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_the_order_of_warps_and_blocks(plan, dtype):
    machine.plan = PLANS[plan]
    p = random_problem((70,), K=200, O=96, dtype=dtype)
    results = []
    for machine.seed in SEEDS:
        results.append(run(p, dropout_p=0.2, seed=3))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("plan", PLANS)
def test_two_ways_to_say_a_gate_give_the_same_bits(plan):
    """Gates from the router, handed back as given ones: the same kernels, the same result."""
    machine.plan = PLANS[plan]
    p = random_problem((40,), K=72, O=40, dtype=torch.bfloat16)
    y, gates = run(p, return_gates=True)
    p.gates, p.router_weight = gates, None
    assert torch.equal(cuda_emulated_gated(p), y)


def cuda_emulated_gated(p: Problem) -> torch.Tensor:
    from rode_kernels import gated_mixture

    kwargs = dict(ranks=p.ranks, scaling=p.scaling, base=p.base, backend="cuda-emulated")
    return gated_mixture(p.x, p.A, p.B, p.gates, **kwargs)


def loads(t: torch.Tensor) -> int:
    return emulator.traffic(t.data_ptr())[0]["bytes"]


def stores(t: torch.Tensor) -> int:
    return emulator.traffic(t.data_ptr())[1]["bytes"]


def closed_but_for(tokens: list[int], M: int, **rest) -> Problem:
    """The logits of these tokens are positive, those of all others negative, for every expert."""
    p = random_problem((M,), K=64, O=192, bias=False, **rest)
    p.x[:, 0] = -20.0
    p.x[tokens, 0] = 20.0
    p.router_weight[:, 0] = 1.0
    return p


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [FUSED, TWO], ids=["fused", "two launches"])
def test_in_place_touches_what_is_open_and_nothing_else(plan, dtype):
    machine.plan = plan
    p = closed_but_for([70, 72], 200, dtype=dtype)
    base, row = p.base.clone(), 192 * dtype.itemsize
    y = run(p, base=base, inplace=True)
    assert y is base
    # 16 tokens of one warp; B by that block alone, once a block that shares O
    assert loads(base) == stores(base) == 16 * row
    assert loads(p.B) == p.B.nbytes
    others = torch.arange(200) // 16 != 70 // 16
    assert torch.equal(base[others], p.base[others])
    truth = oracle(p).y
    assert (base[70].double() - truth[70]).abs().max() <= 16 * torch.finfo(dtype).eps * truth[70].abs().max()


@pytest.mark.parametrize("plan", PLANS)
def test_all_closed_moves_x_and_gates_alone(plan):
    machine.plan = PLANS[plan]
    p = closed_but_for([], 100, dtype=torch.bfloat16)
    base = p.base.clone()
    run(p, base=base, inplace=True)
    assert loads(base) == stores(base) == loads(p.B) == 0
    assert torch.equal(base, p.base)
    assert loads(p.x) == p.x.nbytes
    y = run(p)
    assert torch.equal(y, p.base)
    assert loads(p.B) == 0
    assert loads(p.base) == stores(y) == y.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_closed_pairs_skip_their_steps(dtype):
    """32 columns of v are 2 steps of mma in 16 bits and 4 in float32: each expert of rank 16 has a half of them."""
    machine.plan = FUSED
    reads = {}
    for name, bias in (
        ("both", (1e9, 1e9)),
        ("first", (1e9, -1e9)),
        ("second", (-1e9, 1e9)),
        ("none", (-1e9, -1e9)),
    ):
        p = random_problem((64,), K=64, O=256, ranks=(16, 16), dtype=dtype)
        p.router_bias.copy_(torch.tensor(bias))
        run(p)
        reads[name] = emulator.shared_traffic()[0]["phases"]
    tiles = 256 * dtype.itemsize // 128
    # 8 rows of 16 bytes are a phase; a step reads 32 bytes of 128 / itemsize rows of B, in each of 4 warps
    of_a_step = tiles * 4 * (128 // dtype.itemsize // 8 * 2)
    steps = 16 * dtype.itemsize // 32
    assert reads["both"] - reads["first"] == reads["both"] - reads["second"] == steps * of_a_step
    assert reads["both"] - reads["none"] == 2 * steps * of_a_step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [(2, 4, 8, 16), (16, 16), (40, 24)], ids=str)
def test_no_bank_conflicts(dtype, ranks):
    """Copies into shared memory, ldmatrix and base's way through it; a dropped swizzle shows here and nowhere else."""
    many = sum(ranks) * dtype.itemsize > 128
    for plan in (*PLANS.values(), replace(TWO, keep_v=True)):
        if (plan.rows == 16 and many) or (plan.keep_v and not many):
            continue
        machine.plan = plan
        run(random_problem((64,), K=512, O=512, dtype=dtype, ranks=ranks))
        loaded, stored = emulator.shared_traffic()
        assert (loaded["conflicts"], stored["conflicts"]) == (0, 0), plan


def test_launches():
    """One, or two for few tokens, and one more where float32 parameters meet 16-bit activations."""

    def kernels(**problem):
        run(random_problem(**{"K": 128, "O": 128, "dtype": torch.bfloat16, **problem}))
        return [launch["kernel"] for launch in emulator.launches()]

    assert kernels(tokens=(128,)) == ["forward_fused"]
    machine.multiprocessors = 8
    assert kernels(tokens=(20,), K=8192) == ["forward_shrink", "forward_expand"]
    assert kernels(tokens=(1,), K=8192) == ["forward_shrink", "forward_expand"]
    machine.multiprocessors = 2
    assert kernels(tokens=(64,), ranks=(128,)) == ["forward_shrink", "forward_expand"]
    assert kernels(tokens=(128,), parameter_dtype=torch.float32) == ["pack_parameters", "forward_fused"]
    assert kernels(tokens=(0,)) == []


def test_traffic_of_one_launch():
    """x and base once, y once, the weights once a tile of 64 tokens, u and g once; whole sectors in all that is large."""
    M, K, O, N = 192, 256, 320, 4
    machine.plan = FUSED
    p = random_problem((M,), K=K, O=O, dtype=torch.bfloat16)
    y, gates = run(p, return_gates=True)
    assert loads(p.x) == p.x.nbytes
    assert loads(p.base) == stores(y) == y.nbytes
    assert stores(p.x) == stores(p.base) == loads(y) == 0
    for weight in (p.A, p.B, p.router_weight):
        assert loads(weight) == 3 * weight.nbytes
    assert stores(gates) == M * N * 4
    for t, way in ((p.x, 0), (p.base, 0), (y, 1)):
        count = emulator.traffic(t.data_ptr())[way]
        assert count["used"] == 32 * count["sectors"]


@pytest.mark.parametrize("K", [64, 100, 101])
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_in_float32_give_the_bits_of_rounded_ones(K, parameter_dtype):
    p = random_problem((70,), K=K, O=40, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    mixed = run(p)
    for name in ("A", "B", "router_weight"):
        setattr(p, name, getattr(p, name).bfloat16())
    if parameter_dtype == torch.float32:  # only one of them is float32
        p.B = p.B.float()
    assert torch.equal(run(p), mixed)


def high_precision() -> None:
    torch.set_float32_matmul_precision("high")


def new_switch() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


@pytest.mark.parametrize("switch", [high_precision, new_switch])
def test_tf32_follows_torchs_own_switch(switch):
    p = random_problem((64,), K=256, O=64)
    truth, exact = oracle(p).y, run(p)
    before, new_before = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.fp32_precision
    try:
        switch()
        fast = run(p)
        low = run(random_problem((4,), dtype=torch.bfloat16))
    finally:
        torch.backends.cuda.matmul.fp32_precision = new_before
        torch.set_float32_matmul_precision(before)
    assert low.isfinite().all()
    of_exact, of_fast = ((y.double() - truth).abs().max() / truth.abs().max() for y in (exact, fast))
    assert of_exact < 2e-6
    assert 2e-5 < of_fast < 5e-3


def test_what_is_not_finite_stays_so_in_float32():
    """An infinity is not the sum of two tf32 values; what comes of it may be NaN, but nothing finite, and no other token's."""
    p = random_problem((4,), K=8, O=8, ranks=(2,), bias=False)
    p.x[1, 0], p.A[:, 0], p.router_weight[:, 0] = float("inf"), 1.0, 1.0
    finite = run(p).isfinite()
    assert finite.all(1).tolist() == [True, False, True, True]
    assert not finite[1].any()


def test_a_second_call_knows_nothing_of_the_first():
    p = random_problem((64,), K=64, O=64)
    assert torch.equal(run(p), run(p))


@pytest.mark.parametrize(
    ("problem", "why"),
    [
        (dict(dtype=torch.float64), "take float32, float16 and bfloat16, got torch.float64"),
        (dict(ranks=(1025,)), r"sum\(ranks\) from 1 to 1024, got 1025"),
        (dict(ranks=(1,) * 65), r"len\(ranks\) from 1 to 64, got 65"),
        (dict(K=32769), "in_features from 1 to 32768, got 32769"),
        (dict(O=32769), "out_features from 1 to 32768, got 32769"),
    ],
)
def test_what_is_outside_is_refused_with_the_reason(problem, why):
    with pytest.raises(ValueError, match=f"backend='cuda-emulated': .*{why}; .*name 'reference'"):
        run(random_problem((1,), **problem))


def test_too_many_tokens_are_refused():
    x = torch.zeros(1, 1).expand(2**20 + 1, 1)
    assert "tokens from 0 to 1048576" in beyond_kernels(x, 1, make_mixture((1,), (1.0,)))
    assert beyond_kernels(x[1:], 1, make_mixture((1,), (1.0,))) == ""


def test_the_largest_mixture_is_taken():
    """R = 1024 and N = 64 fill the arrays of the kernels' parameters."""
    sweep(
        Plan(fused=False, rows=64, splits=1, out_tiles=1), torch.bfloat16, M=3, K=24, O=20, ranks=(16,) * 64
    )


def test_long_sums_keep_their_accuracy_in_float32():
    """Tensor cores truncate when they add (the emulator's do): a sum over K or R may not be left to them alone."""
    sweep(TWO, torch.float32, M=5, K=8192, O=8, ranks=(3,))
    sweep(
        Plan(fused=False, rows=64, splits=1, out_tiles=1),
        torch.float32,
        M=5,
        K=8,
        O=40,
        ranks=(16,) * 64,
        open_share=1.0,
    )


def test_a_mistake_names_the_kernel():
    """What would be memory corruption on a device: A is shorter than it says."""
    p = random_problem((64,), K=64, O=64, dtype=torch.bfloat16)
    native = cuda_emulated.native
    mixture = make_mixture(p.ranks, p.scaling)
    machine.plan = FUSED
    misaligned = torch.cat([p.x.flatten(), p.x.new_zeros(1)])[1:]
    assert misaligned.data_ptr() % 4 == 2
    x = misaligned.view(64, 64)
    operands = ForwardOperands(x, p.A, p.B, p.router_weight, None, None, None, None)
    cuda_emulated.forward(operands, Settings(mixture, 0.0, False), False)
    run = native.ForwardLaunch(
        **dict(dtype=3, tokens=64, in_features=64, out_features=64, ranks=p.ranks, scaling=p.scaling),
        **dict(dropout_p=0.0, dense=False, ld_x=64, ld_base=0, ld_y=0, ld_A=64, ld_B=30),
        **dict(fused=True, rows=64, splits=1, out_tiles=1, keep_v=False, device=0),
    )
    where = r"kernel forward_fused, block \(0, 0, 0\), thread \d+: access through a null"
    with pytest.raises(native.EmulatorError, match=where):
        run(p.x.data_ptr(), 0, 0, *(t.data_ptr() for t in (p.A, p.router_weight, p.B)), *[0] * 6, False, 0)


@pytest.mark.skipif(cuda._native is None, reason="built without nvcc")
def test_without_a_driver_it_loads_and_says_so():
    """The module imports where no driver is, and an error of the runtime becomes an exception that names the call."""
    if cuda._native.driver_version() > 0:
        pytest.skip("there is a driver")
    available, why = cuda.status()
    assert not available
    assert "no NVIDIA driver here (built with CUDA" in why
    with pytest.raises(
        RuntimeError, match=r"rode_kernels: CUDA kernel cudaSetDevice failed: .* \(error \d+\)"
    ):
        cuda._native.load_kernels(0)
    with pytest.raises(ValueError, match="backend='cuda' is not available here: no NVIDIA driver"):
        run(random_problem((4,)), backend="cuda")


class OldDriver:
    ARCHITECTURES = "80,90"

    @staticmethod
    def runtime_version() -> int:
        return 13000

    @staticmethod
    def driver_version() -> int:
        return 12080


@pytest.mark.parametrize(
    ("built", "device", "runs"),
    [
        ((80,), (8, 0), True),
        ((80,), (8, 9), True),  # the same generation
        ((80,), (9, 0), True),  # by its PTX
        ((80, 86, 89, 90, 100, 120), (12, 1), True),
        ((80, 86, 89, 90, 100, 120), (11, 0), False),  # PTX of the newest only
        ((90,), (8, 0), False),
        ((80,), (7, 5), False),
        ((86,), (8, 0), False),
    ],
)
def test_which_devices_a_build_serves(built, device, runs):
    assert cuda.serves(built, *device) is runs


def test_an_old_driver_is_named(monkeypatch):
    monkeypatch.setattr(cuda, "_native", OldDriver)
    cuda.status.cache_clear()
    try:
        assert cuda.status() == (
            False,
            "the driver serves CUDA 12.8, too old (built with CUDA 13.0 for sm_80, sm_90)",
        )
    finally:
        cuda.status.cache_clear()
