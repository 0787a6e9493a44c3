"""The benchmark of greedy decoding runs four systems on one set of weights, and refuses wrong logits."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import generate
from benchmarks.__main__ import main
from benchmarks.cases import QV
from benchmarks.generate import Decoder


def tiny(dtype: torch.dtype):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
    )
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


@pytest.fixture
def models(monkeypatch):
    monkeypatch.setattr(generate, "MODELS", {"tiny": Decoder(tiny, QV)})
    torch.manual_seed(0)
    return generate.systems(tiny(torch.float32).requires_grad_(False), QV)


IDS = torch.arange(10)[None]


def test_rates_and_what_is_written(models, tmp_path, capsys):
    file = tmp_path / "generate.json"
    main(["generate", "--rounds", "2", "--tokens", "3", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["benchmark"] == "generate"
    rows = found["rows"]
    assert [row["system"] for row in rows] == ["base", "LoRA merged", "LoRA", "rode"] * 2
    assert [row["dtype"] for row in rows[::4]] == ["float32", "bfloat16"]
    for row in rows:
        rate = row["tokens_per_second"]
        assert 0 < rate["low"] <= rate["median"] <= rate["high"]
        assert (row["case"], row["prompt"], row["new"]) == ("tiny", generate.PROMPT, 3)
        assert (row["open_share"] is not None) == (row["system"] == "rode")
    assert rows[0]["ratio"]["median"] == 1
    assert 0.3 < rows[3]["open_share"] < 0.7
    assert capsys.readouterr().out.count("of the base's") == len(rows)
    with pytest.raises(SystemExit, match="--cases: expected some of tiny; got demo"):
        main(["generate", "--cases", "demo"])


def test_weights_are_shared_but_for_the_merged_layers(models):
    base = {name: p.data_ptr() for name, p in models["base"].named_parameters()}
    for name, model in models.items():
        frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
        new = frozen - set(base.values())
        assert len(new) == (2 * len(QV) if name == "LoRA merged" else 0), name
    assert not any(isinstance(m, nn.Dropout) and m.training for m in models["LoRA"].modules())


def test_all_systems_but_the_base_differ_from_it(models):
    generate.check(models, IDS)
    base = generate.logits(models["base"], IDS)
    for name in ("LoRA merged", "LoRA", "rode"):
        assert not torch.allclose(generate.logits(models[name], IDS), base, rtol=1e-2), name


@pytest.mark.parametrize("name", ["rode", "LoRA"])
def test_wrong_logits_are_not_timed(models, name):
    model, other = models[name], {"rode": "lm_head", "LoRA": "o_proj"}[name]
    layer = next(m for n, m in model.named_modules() if n.endswith(other))
    layer.register_forward_hook(lambda _, __, y: 1.01 * y)
    with pytest.raises(RuntimeError, match=rf"{name} is wrong \(logits of prompt"):
        generate.check(models, IDS)


def test_an_error_in_decoding_alone_is_found(models):
    head = next(m for n, m in models["rode"].named_modules() if n.endswith("lm_head"))
    head.register_forward_hook(lambda _, __, y: 1.01 * y if y.shape[1] == 1 else y)
    with pytest.raises(RuntimeError, match=r"rode is wrong \(logits of decoding"):
        generate.check(models, IDS)


def test_no_token_ends_the_answer(models):
    answer = generate.generate(models["base"], IDS, 4)
    models["base"].generation_config.eos_token_id = answer[0, 0].item()
    with pytest.raises(RuntimeError, match="expected 4 new tokens, got 1"):
        generate.generate(models["base"], IDS, 4)


def test_the_models():
    # SmolLM2-135M with 64 more tokens, LLaVA's projector, the tower; four blocks of Llama-7B, tokens and head, a norm
    demo = 134_515_008 + 64 * 576 + 554_112 + 22_056_576
    llama = 4 * 202_383_360 + 2 * 32_000 * 4096 + 4096
    for name, parameters, layers in (("demo", demo, 60), ("llama-4096", llama, 8)):
        build, targets = generate.MODELS[name]
        with torch.device("meta"):
            model = build(torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == parameters
        pattern = targets if isinstance(targets, str) else rf".*\.({'|'.join(targets)})"
        assert len([n for n, _ in model.named_modules() if re.fullmatch(pattern, n)]) == layers
