"""The benchmark of plans: every plan gives the same y, a wrong one is noticed, and it says what it would run where it cannot."""

from __future__ import annotations

import pytest
import torch

from benchmarks import plans
from benchmarks.__main__ import main
from rode_kernels import backends
from rode_kernels.backends.cuda.emulated import native
from rode_kernels.backends.cuda.prepared import Kernels
from rode_kernels.backends.gpu.plans import Plan

ONE, TWO = Plan(True, 64, 1, 1), Plan(False, 64, 2, 1)


def calls():
    if not backends()["cuda-emulated"].available:
        pytest.skip(backends()["cuda-emulated"].reason)
    native.reset(0)
    return plans.calls_of(Kernels(native), plans.problem(70, 136, "cpu"), [ONE, TWO], 0, 0)


def test_every_plan_is_a_call():
    found = calls()
    assert list(found) == ["one launch", "two launches, splits 2, out_tiles 1"]
    native.reset(0)
    found["two launches, splits 2, out_tiles 1"]()
    assert [launch["kernel"] for launch in native.launches()] == ["forward_shrink", "forward_expand"]


def test_a_plan_with_another_result_is_noticed(monkeypatch):
    forward = plans.OnePlan.forward

    def wrong(self, *args):
        y, *rest = forward(self, *args)
        return y if self.plan.fused else y * 2, *rest

    monkeypatch.setattr(plans.OnePlan, "forward", wrong)
    with pytest.raises(RuntimeError, match="the plan 'two launches, splits 2, out_tiles 1' differs by"):
        calls()


def test_without_a_gpu_it_says_what_it_would_run(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    main(["plans"])
    assert "cuda cannot run here" in capsys.readouterr().out
