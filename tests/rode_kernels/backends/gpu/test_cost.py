"""The cost model against what the emulator counts, and the choice and the words that follow from it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import traffic
from mixture_oracle import random_problem
from rode_kernels import backends, gated_mixture, rectified_mixture
from rode_kernels.__main__ import main
from rode_kernels.backends.cuda.emulated import machine, native
from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.planner import (
    plan_backward,
    plan_forward,
    typical_device,
    variants_backward,
    variants_forward,
)
from rode_kernels.backends.gpu.plans import ProblemShape

needs_emulator = pytest.mark.skipif(not backends()["cuda-emulated"].available, reason="needs the emulator")
LLAVA = (4096, 4096, 30, 4)
RANKS = {30: (2, 4, 8, 16), 60: (30, 30), 112: (16,) * 7, 300: (100, 200)}


@pytest.fixture(autouse=True)
def as_found():
    yield
    machine.plan, machine.backward_plan = None, None


@needs_emulator
@pytest.mark.parametrize(
    "R", [R if R in (30, 112) else pytest.param(R, marks=pytest.mark.slow) for R in RANKS]
)
@pytest.mark.parametrize("router", [True, False], ids=["routed", "gated"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("M", "K", "O"), [(16, 1024, 512), (256, 512, 896)])
def test_formulas_tell_what_the_emulator_counts(R, router, dtype, M, K, O):
    """All variants: DRAM and L2 within 3 %."""
    ranks, e = RANKS[R], dtype.itemsize
    p = random_problem((M,), K=K, O=O, ranks=ranks, dtype=dtype, router=router, open_share=1.0)
    call = ProblemShape(M, K, O, R, len(ranks), e, routed=router)
    options = dict(ranks=ranks, scaling=p.scaling, base=p.base, backend="cuda-emulated")
    names = ("x", "A", "B", "router_weight", "router_bias") if router else ("x", "A", "B", "gates")
    if router:  # every gate is open
        p.router_bias.fill_(1e6)
    else:
        p.gates.abs_().add_(0.1)

    def operation(leaves):
        return (rectified_mixture if router else gated_mixture)(*leaves, **options)

    for plan in variants_forward(call, 8, machine.memory):
        machine.plan = plan
        operation([getattr(p, n) for n in names])
        compare(cost.forward(call, plan), plan)
    machine.plan = None
    leaves = [getattr(p, n).detach().requires_grad_() for n in names]
    y = operation(leaves)
    plans = variants_backward(call, 8, machine.memory)
    for machine.backward_plan in plans:
        torch.autograd.grad(y, leaves, p.dy, retain_graph=True)
        compare(cost.backward(call, machine.backward_plan), machine.backward_plan)


def compare(predicted: cost.Cost, plan) -> None:
    assert predicted.launches == len(native.launches())
    for step, launch in zip(predicted.steps, native.launches(), strict=True):
        blocks = launch["grid"][0] * launch["grid"][1] * launch["grid"][2]
        some_idle = getattr(plan, "groups", 0) == 4 and launch["kernel"] == "grad_input_pass"
        assert step.blocks <= blocks if some_idle else step.blocks == blocks, (plan, launch)
    counted = native.all_traffic()
    assert predicted.dram == pytest.approx(sum(d["launch_used"] for d in counted), rel=0.03), plan
    assert predicted.l2 == pytest.approx(sum(d["bytes"] for d in counted), rel=0.03), plan


@needs_emulator
def test_formulas_at_full_width():
    """The sizes of the traffic table."""
    one = traffic.fused(8192, 4096, 4096, inplace=False)
    predicted = cost.forward(ProblemShape(8192, 4096, 4096, 30, 4), traffic.FUSED)
    assert predicted.dram == pytest.approx(one.dram, rel=0.03)
    assert predicted.l2 == pytest.approx(one.l2, rel=0.03)
    some = traffic.backward(8192, 4096, 4096, 132)
    predicted = cost.backward(
        ProblemShape(8192, 4096, 4096, 30, 4, base=False), plan_backward(ProblemShape(8192, *LLAVA), 132)
    )
    assert predicted.dram == pytest.approx(some.dram, rel=0.03)
    assert predicted.l2 == pytest.approx(some.l2, rel=0.03)


def test_half_open_tiles_in_place_move_half_of_base():
    whole = cost.forward(ProblemShape(8192, 4096, 4096, 30, 4, in_place=True), traffic.FUSED)
    half = cost.forward(ProblemShape(8192, 4096, 4096, 30, 4, in_place=True, open_share=0.5), traffic.FUSED)
    assert whole.dram - half.dram == 8192 * 4096 * 2


@pytest.mark.parametrize("multiprocessors", [20, 108, 132, 148])
@pytest.mark.parametrize("tokens", [1, 16, 512, 4096, 8192, 65536])
@pytest.mark.parametrize("open_share", [1.0, 0.1])
def test_the_lowest_floor_is_chosen(tokens, multiprocessors, open_share):
    device = typical_device(multiprocessors)
    call = ProblemShape(tokens, *LLAVA, open_share=open_share)
    for of, choose, variants in (
        (cost.forward, plan_forward, variants_forward),
        (cost.backward, plan_backward, variants_backward),
    ):
        floors = {v: of(call, v).floor(device) for v in variants(call, multiprocessors)}
        assert len(floors) > 1
        assert floors[choose(call, multiprocessors)] == min(floors.values())


def test_what_is_expected_to_be_open_decides():
    """With little to read of dy more parts of t cost less than ranges of dB."""
    half, few = (plan_backward(ProblemShape(8192, *LLAVA, open_share=s), 132) for s in (1.0, 0.05))
    assert few.o_tiles > half.o_tiles


def test_a_launch_of_few_blocks_has_their_share_of_the_device():
    device = cost.DEVICES["A100"]
    few, many = (cost.Step(1e9, 1e9, blocks).floor(device) - device.launch for blocks in (27, 108))
    assert few == pytest.approx(4 * many)


def test_the_command_explains_the_choice(capsys):
    main(["plan", "--m", "8192", "--k", "4096", "--o", "4096", "--ranks", "2,4,8,16", "--device", "H100"])
    said = capsys.readouterr().out
    assert "one launch" in said
    assert "chosen" in said
    assert "a prediction, not a measurement" in said
    main(["plan", "--m", "16", "--k", "4096", "--o", "4096", "--device", "A100", "--dtype", "float32"])
    assert "two launches" in capsys.readouterr().out
    main(["plan", "--m", "8192", "--k", "4096", "--o", "4096", "--ranks", "64,64", "--device", "H100"])
    chosen = [line for line in capsys.readouterr().out.splitlines() if line.endswith("chosen")]
    assert [line.split("  ")[1] for line in chosen] == ["cuda: matrix products by PyTorch"] * 2
    with pytest.raises(SystemExit):
        main(["plan", "--m", "0", "--k", "4096", "--o", "4096"])
    assert "--m: expected a whole number of at least 1, got '0'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["plan", "--m", "1", "--k", "4096", "--o", "4096", "--ranks", "1000,100"])
    assert "sum of --ranks: the GPU kernels take at most 1024, got 1100" in capsys.readouterr().err


def test_without_a_command_it_lists_the_backends(capsys):
    main([])
    said = capsys.readouterr().out
    assert all(name in said for name in backends())
