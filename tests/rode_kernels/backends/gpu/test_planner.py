"""Which kernels a call gets: every plan is one that the kernels have, whatever the shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.planner import plan_backward, plan_forward, variants_forward
from rode_kernels.backends.gpu.plans import Plan, ProblemShape, can_fuse


def llava(tokens: int) -> ProblemShape:
    return ProblemShape(tokens, 4096, 4096, 30, 4)


@given(
    tokens=st.integers(0, 2**20),
    in_features=st.integers(1, 32768),
    out_features=st.integers(1, 32768),
    total_rank=st.integers(1, 1024),
    routed_experts=st.integers(0, 64),
    element_size=st.sampled_from([2, 4]),
    multiprocessors=st.integers(1, 200),
)
def test_every_plan_is_one_that_the_kernels_have(
    tokens, in_features, out_features, total_rank, routed_experts, element_size, multiprocessors
):
    experts = max(routed_experts, 1)
    call = ProblemShape(
        tokens, in_features, out_features, total_rank, experts, element_size, routed=routed_experts > 0
    )
    plan = plan_forward(call, multiprocessors)
    plan.check(total_rank, routed_experts, element_size)
    depth = 128 // element_size
    stages, outs = -(-in_features // depth), -(-out_features // depth)
    per_split = -(-stages // plan.splits)
    assert (plan.splits - 1) * per_split < stages, "a split without work"
    assert plan.splits <= 65535
    assert -(-outs // plan.out_tiles) <= 65535
    assert plan.out_tiles <= outs


@pytest.mark.parametrize("multiprocessors", [108, 132])
def test_one_launch_where_tiles_fill_the_device(multiprocessors):
    assert plan_forward(llava(8192), multiprocessors).fused
    assert plan_forward(llava(65536), multiprocessors).fused
    assert not plan_forward(llava(1024), multiprocessors).fused


def test_two_launches_are_offered_at_8192_tokens_but_not_taken_unmeasured():
    """On an H100 or H200 Plan(False, 64, 2, 32) has the lowest floor of those with two launches; one launch stays the choice."""
    call, other = llava(8192), Plan(fused=False, rows=64, splits=2, out_tiles=32)
    device = cost.DEVICES["H200"]
    plans = variants_forward(call, device.multiprocessors)
    assert other in plans
    floors = {plan: cost.forward(call, plan).floor(device) for plan in plans}
    assert min((p for p in plans if not p.fused), key=lambda p: floors[p]) == other
    assert plan_forward(call, device.multiprocessors).fused


def test_few_tokens_share_k():
    """Until the device is full, or reading the parts' sums again costs more than it saves."""
    for tokens, rows in ((1, 16), (16, 16), (17, 64), (512, 64)):
        plan = plan_forward(llava(tokens), 108)
        assert (plan.fused, plan.rows) == (False, rows)
        of_a_tile, columns, K = min(tokens, rows), 40, 4096
        bytes_of = lambda splits: (columns + of_a_tile) * K * 2 / splits + splits * of_a_tile * columns * 4  # noqa: E731,B023
        tiles = -(-tokens // rows)
        better = min(range(1, 65), key=bytes_of)
        assert plan.splits <= -(-108 // tiles)
        assert bytes_of(plan.splits) <= 1.15 * bytes_of(min(better, -(-108 // tiles)))


def test_many_columns_take_two_launches():
    assert can_fuse(64, 16)
    assert not can_fuse(65, 0)
    assert not can_fuse(32, 17)
    assert not plan_forward(ProblemShape(65536, 4096, 4096, 256, 16), 108).fused


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        (Plan(True, 64, 1, 1), "do not fit one launch"),
        (Plan(False, 16, 1, 1), "16 if a row of B has at most 128 bytes"),
        (Plan(False, 32, 1, 1), "tiles have 64 tokens, or 16"),
        (Plan(False, 64, 0, 1), "splits and out_tiles of at least 1"),
    ],
)
def test_a_plan_that_no_kernel_serves_is_refused(plan, why):
    with pytest.raises(ValueError, match=why):
        plan.check(65, 4, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_v_is_kept_with_two_launches_and_several_passes_alone(fused):
    with pytest.raises(
        ValueError, match="v is kept with two launches, if a row of B has more than 128 bytes"
    ):
        Plan(fused, 64, 1, 1, keep_v=True).check(64, 4, 2)
    Plan(False, 64, 1, 1, keep_v=True).check(65, 4, 2)


def test_a_tile_of_O_that_no_block_holds_is_refused():
    plan = plan_backward(ProblemShape(8192, 4096, 4096, 30, 4), 132)
    plan.check(2)
    with pytest.raises(ValueError, match="at most 384 columns of y"):
        replace(plan, o_tile_columns=448).check(2)
