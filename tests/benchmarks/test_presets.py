"""The table of presets: every system runs, is checked, and is counted."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import presets
from benchmarks.__main__ import main
from rode.tuner.presets import PRESETS

TINY = dict(
    hidden_size=36,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=3,
    num_key_value_heads=1,
    vocab_size=64,
)


def test_table_of_every_preset(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(presets, "SMALL", TINY)
    monkeypatch.setattr(presets, "PAPER", TINY)
    file = tmp_path / "presets.json"
    main(["presets", "--rounds", "2", "--json", str(file)])
    rows = {row["system"]: row for row in json.loads(file.read_text())["rows"]}
    assert set(rows) == {*PRESETS, presets.BASELINE, "Poly (PEFT)", "X-LoRA (PEFT)", "moe-llava"}
    # per block: q 36 -> 36 and v 36 -> 12; ranks 2, 4, 8, 16 and a router of 4 rows
    assert rows["rode"]["trained"] == 2 * (30 * (36 + 36) + 30 * (36 + 12) + 2 * 4 * 36)
    assert rows["lora"]["trained"] == rows[presets.BASELINE]["trained"] == 2 * 8 * (36 + 36 + 36 + 12)
    assert all(row["trained"] == row["trained_llama_7b"] for n, row in rows.items() if n != "X-LoRA (PEFT)")
    for row in rows.values():
        assert 0 < row["step_ratio"]["low"] <= row["step_ratio"]["median"] <= row["step_ratio"]["high"]
    # PEFT keeps x once more, float32 and dropped; the operation keeps u and g alone
    assert rows["lora"]["kept_mib"] < rows[presets.BASELINE]["kept_mib"]
    assert "step against LoRA (PEFT)" in capsys.readouterr().out


def test_a_wrong_system_is_not_timed(monkeypatch):
    monkeypatch.setattr(presets, "SMALL", TINY)
    ids = torch.randint(0, 64, (2, 8))
    case = presets.Case.make("rode", presets.systems()["rode"], ids)
    case.check()
    forward, calls = case.model.forward, []

    def wrong(*args, **kwargs):
        out = forward(*args, **kwargs)
        calls.append(out.logits)
        out.logits = out.logits * (1 + 0.01 * (len(calls) == 1))
        return out

    monkeypatch.setattr(case.model, "forward", wrong)
    with pytest.raises(RuntimeError, match="rode is wrong"):
        case.check()
