"""What the CUDA forward pass moves stays within its bounds; counts of a few tiles tell those of many; eager forms are right."""

from __future__ import annotations

import json
import os

import pytest
import torch

from benchmarks import traffic
from benchmarks.__main__ import main
from benchmarks.eager import BytesMoved, packed, peft_loop
from rode_kernels import backends
from rode_kernels.backends.gpu import cost
from rode_kernels.backends.gpu.plans import BackwardPlan

needs_emulator = pytest.mark.skipif(
    not backends()["cuda-emulated"].available and os.environ.get("RODE_EMULATE") != "1",
    reason="needs the emulator",
)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[int, str], dict]:
    """The benchmark as users run it."""
    file = tmp_path_factory.mktemp("traffic") / "table.json"
    main(["traffic", "--json", str(file)])
    return {(row["tokens"], row["what"]): row for row in json.loads(file.read_text())}


@needs_emulator
def test_the_bounds_hold(rows):
    for what in ("one launch", "one launch, base in place"):
        row = rows[8192, what]
        assert row["launches"] == 1
        assert row["dram_ratio"] <= 1.05
        assert row["l2_ratio"] <= 1.6
        assert row["sector_use"] >= 0.95
    # more than the fewest by t's parts: narrower tiles of O, which make them, cost bytes and save time
    for M, dram in ((8192, 1.33), (65536, 1.17)):
        for multiprocessors in (108, 132):
            row = rows[M, f"backward, {multiprocessors} multiprocessors"]
            assert row["launches"] == 4
            assert row["dram_ratio"] <= dram
            assert row["l2_ratio"] <= 2.2
            assert row["sector_use"] >= 0.9
    triton = rows.get((8192, "Triton"))
    if triton is not None:  # installed
        assert triton["launches"] == 1
        assert triton["dram_ratio"] <= 1.05
        assert triton["l2_ratio"] <= 1.6
        for M, dram in ((8192, 1.25), (65536, 1.10)):
            for multiprocessors in (108, 132):
                backward = rows[M, f"Triton, backward, {multiprocessors} multiprocessors"]
                assert backward["launches"] == 4
                assert backward["dram_ratio"] <= dram
                assert backward["l2_ratio"] <= 2.2
    everything, sparse = (
        rows[8192, what] for what in ("one launch, base in place", "the same, 10 % of 256-token runs open")
    )
    assert sparse["dram"] <= 0.45 * everything["dram"]
    assert sparse["l2"] <= 0.45 * everything["l2"]
    assert rows[8192, "fewest possible"]["dram"] == 2 * (3 * 8192 * 4096 + 64 * 4096)


@needs_emulator
@pytest.mark.parametrize(("K", "O"), [(512, 768), (4096, 4096)])
@pytest.mark.parametrize("open_", [True, False])
def test_counts_scale_with_the_tiles(K, O, open_):
    one, two, more = (
        traffic.emulate(traffic.Case.random(n * 64, K, O, open_=open_), traffic.FUSED, inplace=True)
        for n in (1, 2, 5)
    )
    predicted = traffic.scaled(one, two, 5)
    for name in ("dram", "l2", "sectors", "used"):
        assert getattr(predicted, name) == pytest.approx(getattr(more, name), rel=0.002), name


@needs_emulator
def test_counts_of_the_backward_pass_scale_with_tiles_and_ranges(monkeypatch):
    """Six tiles of 64 tokens in three and two ranges, counted whole, against what calls of one and two tell."""
    K, O = 512, 896
    plan = BackwardPlan(
        many_columns=False,
        o_tiles=3,
        o_tile_columns=320,
        tokens_per_split_y=128,
        groups=3,
        tokens_per_split_x=192,
        tokens_per_split_dx=192,
    )
    monkeypatch.setattr(traffic, "plan_backward", lambda *args: plan)
    whole = traffic.emulate_backward(traffic.Case.random(6 * 64, K, O), plan)
    predicted = traffic.backward(6 * 64, K, O, 108)
    assert predicted.launches == whole.launches
    for name in ("dram", "l2", "sectors", "used"):
        assert getattr(predicted, name) == pytest.approx(getattr(whole, name), rel=0.01), name


@needs_emulator
def test_a_sparse_sequence_is_the_sum_of_its_tiles():
    """One tile in five open, in one call: as the table has it from tiles that are all open and all closed."""
    case = traffic.Case.random(5 * 64, 512, 512)
    case.x[:, 0], case.router[:, 0] = -20.0, 1.0
    case.x[128:192, 0] = 20.0
    whole = traffic.emulate(case, traffic.FUSED, inplace=True)
    open_, closed = (
        traffic.emulate(traffic.Case.random(64, 512, 512, open_=o), traffic.FUSED, inplace=True)
        for o in (True, False)
    )
    assert whole.l2 == open_.l2 + 4 * closed.l2


@needs_emulator
def test_a_wrong_result_is_not_counted(monkeypatch):
    monkeypatch.setattr(traffic.Case, "formula", lambda case: case.base.double() + 1.0)
    with pytest.raises(RuntimeError, match="the result is wrong"):
        traffic.emulate(traffic.Case.random(64, 64, 64), traffic.FUSED, inplace=False)


def test_eager_forms_compute_the_operation():
    case = traffic.Case.random(20, 48, 40)
    case.bias.zero_()
    truth = case.formula()
    args = [t.double() for t in (case.x, case.A, case.B, case.router, case.base)]
    torch.testing.assert_close(peft_loop(*args, traffic.RANKS, traffic.SCALING), truth)
    x, A, B, router, base = args
    expert = torch.arange(4).repeat_interleave(torch.tensor(traffic.RANKS))
    factors = torch.tensor(traffic.SCALING, dtype=torch.float64)[expert]
    torch.testing.assert_close(packed(x, torch.cat([A, router]), B, factors, expert, base), truth)


def test_operators_are_counted_by_what_they_read_and_write():
    a, b = torch.zeros(4, 8), torch.zeros(8, 2)
    with BytesMoved() as moved:
        torch.relu(a @ b).t()  # a view moves nothing
    assert moved.bytes == 4 * (32 + 16 + 8 + 8 + 8)
    assert moved.launches == 2
    with BytesMoved() as moved:
        a + torch.zeros(1, 1).expand(4, 8)  # one value, read once
    assert moved.bytes == 4 * (1 + 32 + 1 + 32)


def test_predicted_floors(tmp_path, capsys):
    """Every device, the operation and the step; said to be predictions; no implementation below the fewest bytes."""
    file = tmp_path / "floors.json"
    main(["roofline", "--json", str(file)])
    assert "not measurements" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert (
        {row["device"] for row in found["operation"]}
        == {row["device"] for row in found["step"]}
        == set(cost.DEVICES)
    )
    for row in found["operation"]:
        shape = (row["tokens"], row["in_features"], row["out_features"])
        device = cost.DEVICES[row["device"]]
        assert row["forward"] >= traffic.fewest(*shape) / device.dram
        assert row["backward"] >= traffic.fewest(*shape, backward=True) / device.dram
