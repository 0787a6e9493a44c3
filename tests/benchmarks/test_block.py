"""The block benchmark runs what configs run, refuses what is wrong, and counts exactly."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import adapted, block
from benchmarks.__main__ import main
from benchmarks.adapted import Plain
from benchmarks.cases import ON_BLOCK
from rode.tuner import RodeLayer
from rode_kernels import backends
from rode_kernels.backends import cpu

TINY = {36: {"intermediate_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(block, "SHAPES", TINY)


PEFT = ["LoRA r=8 (PEFT)", "LoRA r=30 (PEFT)"]


def test_times_of_a_block(tmp_path, capsys):
    file = tmp_path / "block.json"
    main(["block", "--rounds", "2", "--tokens", "16", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["benchmark"] == "block"
    assert found["torch"] == torch.__version__
    rows = found["rows"]
    kinds = {(row["case"], row["dtype"]) for row in rows}
    assert kinds == {(case, dtype) for case in ON_BLOCK for dtype in ("float32", "bfloat16")}
    for case, dtype in kinds:
        of = [row for row in rows if (row["case"], row["dtype"]) == (case, dtype)]
        more = ["loop"] * (case == "qv") + ["X-LoRA (PEFT)"] * ((case, dtype) == ("qv", "float32"))
        assert [row["system"] for row in of] == ["frozen", "rode", "packed", *PEFT, *more]
        assert of[0]["ratio"]["median"] == 1
    for row in rows:
        assert (row["hidden"], row["tokens"], row["dropout"]) == (36, 16, 0.05)
        assert row["checkpointing"] == row["case"].endswith("checkpointed")
        assert 0 < row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
    assert capsys.readouterr().out.count("times the frozen block") == len(rows)


def test_one_row_of_a_block_can_be_asked_for(tmp_path):
    file = tmp_path / "block.json"
    options = ["--cases", "all-checkpointed", "--dtype", "bfloat16", "--width", "36", "--tokens", "8"]
    main(["block", "--rounds", "1", *options, "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert {(row["case"], row["dtype"], row["tokens"]) for row in rows} == {
        ("all-checkpointed", "bfloat16", 8)
    }
    with pytest.raises(SystemExit, match="--width: expected some of 36; got 576"):
        main(["block", "--width", "576"])
    with pytest.raises(SystemExit, match=r"--cases: expected some of qv, .*; got q"):
        main(["block", "--cases", "q"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_are_float32_and_weights_of_the_base_are_shared(dtype):
    steps = block.make_steps(36, 16, dtype=dtype, case=ON_BLOCK["all"])
    base = {p.data_ptr() for p in steps["frozen"].model.parameters()}
    for step in steps.values():
        assert {p.dtype for p in step.trained} <= {torch.float32}
        assert {p.data_ptr() for p in step.model.parameters() if not p.requires_grad} == base
    layers = [m for m in steps["rode"].model.modules() if isinstance(m, RodeLayer)]
    assert len(layers) == len([m for m in steps["packed"].model.modules() if isinstance(m, Plain)]) == 7


def test_a_checkpointed_block_is_computed_again():
    steps = block.make_steps(36, 16, case=ON_BLOCK["qv-checkpointed"])
    passes: list[object] = []
    for name, step in steps.items():
        mlp = next(m for n, m in step.model.named_modules() if n.endswith("mlp"))
        mlp.register_forward_pre_hook(lambda *seen: passes.append(seen))
        step()
        assert len(passes) == 2, name
        passes.clear()


def test_dropout_is_drawn_anew_where_nothing_is_checked():
    for name, step in block.make_steps(36, 16).items():
        first, second = step.forward(), step.forward()
        assert torch.equal(first, second) == (name == "frozen"), name


def test_memory_is_what_the_contract_says():
    rows = {row["system"]: row for row in block.memory(36, 64)}
    # q and v keep one x, and u, g and the seed of dropout each
    x, other = 64 * 36 * 4, 64 * 4 * (30 + 4) + 8
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


@pytest.mark.parametrize("wrong", ["B", "down"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_wrong_block_is_not_measured(monkeypatch, dtype, wrong):
    made = adapted.plain

    def spoilt(base, rode, how):
        model = made(base, rode, how)
        if how == "packed":
            layer = model.model.layers[0].self_attn.v_proj
            with torch.no_grad():
                getattr(layer, wrong).mul_(1.5)
        return model

    monkeypatch.setattr(adapted, "plain", spoilt)
    with pytest.raises(RuntimeError, match="packed is wrong"):
        block.make_steps(36, 16, dtype=dtype)


def test_autocast_is_for_lora_beside_bfloat16(monkeypatch):
    asked = []
    autocast = torch.autocast

    def noted(device, dtype, enabled):
        asked.append(enabled)
        return autocast(device, dtype, enabled=enabled)

    for dtype in (torch.float32, torch.bfloat16):
        steps = block.make_steps(36, 16, dtype=dtype)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "autocast", noted)
            for name, step in steps.items():
                asked.clear()
                assert step.forward().dtype == dtype
                assert asked[0] == (name in PEFT and dtype == torch.bfloat16), name
