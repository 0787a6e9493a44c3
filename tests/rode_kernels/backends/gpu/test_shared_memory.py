"""Shared memory of the CUDA kernels: what launches ask for, what a device gives, and plans that go by both."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixture_oracle import Problem, check, random_problem, with_dropout
from rode_kernels import backends, gated_mixture, rectified_mixture
from rode_kernels.__main__ import main
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.cuda.emulated import machine
from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.planner import plan_backward, plan_forward, variants_backward, variants_forward
from rode_kernels.backends.gpu.plans import Plan, ProblemShape
from rode_kernels.backends.gpu.shared_memory import SharedMemory
from rode_kernels.backends.reference import dropout_keep

if not backends()["cuda-emulated"].available:
    if os.environ.get("RODE_EMULATE") == "1":
        raise RuntimeError(backends()["cuda-emulated"].reason)
    pytest.skip(backends()["cuda-emulated"].reason, allow_module_level=True)
emulator = cuda_emulated.native

LEAST = SharedMemory(emulator, 99 * 1024)  # what a block gets on sm_86, 89 and 120
ONE = Plan(fused=True, rows=64, splits=1, out_tiles=1)
DTYPES = {2: torch.bfloat16, 4: torch.float32}


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    machine.seed, machine.architecture, machine.multiprocessors = 0, 86, 2
    machine.plan = machine.backward_plan = machine.gemm_path = None


def launches(p: Problem, dropout_p: float, backward: bool = False) -> list[dict]:
    """What a pass launches."""
    routed = p.router_weight is not None
    names = ("x", "A", "B", "router_weight", "router_bias") if routed else ("x", "A", "B", "gates")
    leaves = [getattr(p, name).detach().requires_grad_(backward) for name in names]
    y = (rectified_mixture if routed else gated_mixture)(
        *leaves,
        **dict(ranks=p.ranks, scaling=p.scaling, base=p.base, dropout_p=dropout_p, seed=7),
        backend="cuda-emulated",
    )
    if backward:
        torch.autograd.grad(y, leaves, p.dy)
    return emulator.launches()


def most(found: list[dict]) -> int:
    return max(launch["shared_bytes"] for launch in found)


# ---- What launches ask for


@pytest.mark.parametrize("experts", [29, 30, 31, 32])
@pytest.mark.parametrize("size", DTYPES)
def test_bytes_of_one_launch_by_hand(experts, size):
    """Seven stages of 64 rows of x and 40 of weights, 128 bytes each; float32 gates of 64 tokens; two masks of 64 x 8 bytes."""
    call = ProblemShape(8192, 4096, 4096, experts, experts, size, routed=False, dropout=True)
    asked = 7 * (64 + 40) * 128 + 64 * 4 * experts + 2 * 64 * 8
    assert LEAST.asked(call, ONE) == asked > LEAST.limit
    assert LEAST.asked(replace(call, dropout=False), ONE) == asked - 1024 <= LEAST.limit


@pytest.mark.parametrize("size", DTYPES)
@pytest.mark.parametrize("router", [True, False], ids=["routed", "gated"])
@pytest.mark.parametrize(("ranks", "M"), [((2, 4, 8, 16), 70), ((1,) * 29, 16), ((9,) * 20, 17)])
def test_a_plan_asks_for_what_its_launches_ask_for(size, router, ranks, M):
    p = random_problem((M,), K=72, O=136, ranks=ranks, dtype=DTYPES[size], router=router)
    machine.architecture, machine.gemm_path = 90, False  # which gives enough for all
    call = ProblemShape(M, 72, 136, sum(ranks), len(ranks), size, routed=router)
    plans = set(variants_forward(call, 8, machine.memory))
    plans |= {replace(plan, keep_v=False) for plan in plans}
    for dropout_p in (0.0, 0.3):
        of = replace(call, dropout=dropout_p > 0)
        for machine.plan in sorted(plans, key=str):
            assert machine.memory.asked(of, machine.plan) == most(launches(p, dropout_p)), machine.plan
        for machine.backward_plan in variants_backward(call, 2)[:2]:
            found = launches(p, dropout_p, backward=True)
            assert found[0]["kernel"] == "grad_output_pass"
            assert machine.memory.asked(of, machine.backward_plan) == most(found), machine.backward_plan


# ---- Plans that fit


def at_the_edge() -> Iterator[ProblemShape]:
    """Whatever a launch's shared memory follows from, on both sides of where it steps."""
    experts = (1, 8, 9, 16, 17, 28, 29, 30, 31, 32, 33, 64)
    ranks = (1, 8, 16, 29, 30, 31, 32, 33, 64, 65, 128, 224, 225, 240, 256, 257, 1024)
    flags = [(routed, dropout) for routed in (False, True) for dropout in (False, True)]
    for N, R, size, (routed, dropout), M in product(experts, ranks, DTYPES, flags, (16, 2**20)):
        if N <= R:
            yield ProblemShape(M, 4096, 4096, R, N, size, routed=routed, dropout=dropout)


def test_plans_fit_where_a_block_gets_least():
    """With few multiprocessors ranges of tokens are as long as they get. Kernels for devices ask for what the emulated ones do."""
    over, on_devices = 0, cuda._native and SharedMemory(cuda._native, 99 * 1024)
    for call in at_the_edge():
        forward, backward = plan_forward(call, 1, LEAST), plan_backward(call, 1, LEAST)
        assert LEAST.asked(call, forward) <= 99 * 1024, (call, forward)
        assert LEAST.asked(call, backward) <= 99 * 1024, (call, backward)
        if on_devices:
            assert on_devices.asked(call, forward) == LEAST.asked(call, forward)
            assert on_devices.asked(call, backward) == LEAST.asked(call, backward)
        over += LEAST.asked(call, plan_forward(call, 1)) > 99 * 1024
    assert over > 0, "some would not, if nobody looked"


@given(
    tokens=st.integers(0, 2**20),
    in_features=st.integers(1, 32768),
    out_features=st.integers(1, 32768),
    experts=st.integers(1, 64),
    more_ranks=st.integers(0, 960),
    size=st.sampled_from([2, 4]),
    routed=st.booleans(),
    dropout=st.booleans(),
    multiprocessors=st.integers(1, 200),
    kib=st.sampled_from([99, 163, 227]),
)
def test_every_plan_fits(
    tokens, in_features, out_features, experts, more_ranks, size, routed, dropout, multiprocessors, kib
):
    sizes = (tokens, in_features, out_features, experts + more_ranks, experts, size)
    call, memory = ProblemShape(*sizes, routed=routed, dropout=dropout), SharedMemory(emulator, kib * 1024)
    for choose in (plan_forward, plan_backward):
        assert memory.asked(call, choose(call, multiprocessors, memory)) <= kib * 1024


@pytest.mark.parametrize(
    ("R", "size", "kib"),
    # three stages of 64 rows of y and a part of B, gates of 64 tokens, and 8208 bytes for every 128 of a row of B
    [
        (384, 2, (3 * 16384 + 64 * 4 * 8 + 6 * 8208) / 1024),
        (448, 2, (3 * 16384 + 64 * 4 * 8 + 7 * 8208) / 1024),
        (224, 4, (3 * 12288 + 64 * 4 * 8 + 7 * 8208) / 1024),
        (256, 4, (3 * 12288 + 64 * 4 * 8 + 8 * 8208) / 1024),
    ],
)
def test_v_is_kept_where_a_device_has_room_for_it(R, size, kib):
    call = ProblemShape(512, 4096, 4096, R, 8, size, dropout=True)
    for limit in (99, 163, 227):
        plan = plan_forward(call, 108, SharedMemory(emulator, limit * 1024))
        assert plan.keep_v == (kib <= limit)
        if plan.keep_v:
            assert LEAST.asked(call, plan) == kib * 1024
    exact = SharedMemory(emulator, round(kib * 1024))
    assert plan_forward(call, 108, exact).keep_v
    assert not plan_forward(call, 108, replace(exact, limit=exact.limit - 1)).keep_v


@pytest.mark.parametrize("choose", [plan_forward, plan_backward])
def test_where_nothing_fits_one_error_says_so(choose):
    call, none = ProblemShape(512, 4096, 4096, 30, 4), SharedMemory(emulator, 16 * 1024)
    variants = variants_forward if choose is plan_forward else variants_backward
    least = min(none.asked(call, plan) for plan in variants(call, 108))
    why = (
        f"need at least {least} bytes of shared memory in a block for R = 30 and 4 experts, "
        "this device gives 16384; name backend='triton' or 'reference'"
    )
    with pytest.raises(RuntimeError, match=why):
        choose(call, 108, none)


# ---- Runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("experts", "dropout"), [(29, True), (30, True), (31, True), (32, True), (32, False)]
)
def test_many_given_gates_on_an_architecture_that_gives_least(experts, dropout, dtype):
    """Values and gradients. Tokens are many enough for one launch, which is there for 32 experts to the byte, without dropout."""
    machine.architecture = 86
    p = random_problem((192,), K=72, O=136, ranks=(1,) * experts, router=False, dtype=dtype)
    if dropout:
        p = with_dropout(p, dropout_keep(torch.tensor([7]), 0.3, 192, 72), 0.3, 7)
    check(p, backend="cuda-emulated")
    found = launches(p, p.dropout_p)
    assert [launch["kernel"] for launch in found] == (
        ["forward_shrink", "forward_expand"] if dropout else ["forward_fused"]
    )
    assert most(found) <= 101376


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_where_a_block_gets_more_they_take_one_launch(architecture):
    machine.architecture = architecture
    p = random_problem((192,), K=72, O=136, ranks=(1,) * 32, router=False, dtype=torch.bfloat16)
    p = with_dropout(p, dropout_keep(torch.tensor([7]), 0.3, 192, 72), 0.3, 7)
    check(p, backend="cuda-emulated")
    (launch,) = launches(p, 0.3)
    assert (launch["kernel"], launch["shared_bytes"]) == ("forward_fused", 102400)


@pytest.mark.parametrize("architecture", [86, 89, 120])
def test_a_launch_that_asks_for_more_is_refused(architecture):
    """As a device would: a plan that is forced is not looked at before."""
    p = random_problem((64,), K=72, O=136, ranks=(1,) * 29, router=False, dtype=torch.bfloat16)
    machine.architecture, machine.plan = architecture, ONE
    why = (
        "launch of forward_fused: it asks for 101632 bytes of shared memory, "
        f"a block on sm_{architecture} gets at most 101376"
    )
    with pytest.raises(emulator.EmulatorError, match=why):
        launches(p, 0.3)


# ---- What the plan command says


def test_devices_that_are_not_here_have_the_memory_of_their_architecture():
    architectures = {"RTX 4090": 89, "A100": 80, "H100": 90, "H200": 90, "B200": 100}
    assert {name: emulator.max_shared(a) for name, a in architectures.items()} == {
        name: device.shared for name, device in cost.DEVICES.items()
    }


def test_the_command_says_when_one_launch_does_not_fit(capsys):
    sizes = [
        "--m",
        "8192",
        "--k",
        "4096",
        "--o",
        "4096",
        "--ranks",
        ",".join("1" * 29),
        "--gated",
        "--dropout",
    ]
    main(["plan", *sizes, "--device", "RTX 4090"])
    said = capsys.readouterr().out
    assert "given gates, dropout" in said
    assert "cuda: one launch" not in said
    assert "One launch would ask for 101632 bytes of shared memory, a block gets 101376." in said
    main(["plan", *sizes, "--device", "A100"])
    assert "cuda: one launch" in capsys.readouterr().out
