"""The block benchmark refuses what is wrong, and counts exactly."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import block
from benchmarks.__main__ import main
from rode_kernels import backends
from rode_kernels.backends import cpu

TINY = {36: {"intermediate_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(block, "SHAPES", TINY)


def test_times_of_a_block(tmp_path, capsys):
    file = tmp_path / "block.json"
    main(["block", "--rounds", "2", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["torch"] == torch.__version__
    assert [row["system"] for row in found["rows"]] == list(block.systems(36))
    assert found["rows"][0]["ratio"]["median"] == 1
    assert "times the frozen block" in capsys.readouterr().out


def test_memory_is_what_the_contract_says():
    rows = {row["system"]: row for row in block.memory(36, 64)}
    x, other = 64 * 36 * 4, 64 * 4 * (30 + 4)  # q and v keep one x, and u and g each
    if backends()["cpu"].available:
        assert x + 2 * other <= rows["rode"]["kept"] <= 1.02 * (x + 2 * other)
        assert 0 < rows["rode"]["scratch"] == cpu.scratch_bytes() < 64 << 20
    assert not any(row["scratch"] for name, row in rows.items() if name != "rode")
    assert rows["rode"]["kept"] < rows["packed"]["kept"] < rows["loop"]["kept"]
    assert rows["frozen"]["kept"] == rows["frozen"]["peak"] == 0


def test_peak_counts_what_is_alive_at_once():
    def call():
        a = torch.ones(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        return b + b  # b and this, 8000

    assert block.peak_bytes(call) in (8000, 8012)


def test_a_wrong_block_is_not_measured(monkeypatch):
    steps = block.make_steps(36, 16)
    layer = steps["packed"].model.model.layers[0].self_attn.v_proj
    with torch.no_grad():
        layer.B.mul_(1.5)
    with pytest.raises(RuntimeError, match="packed is wrong"):
        block.check(steps)
