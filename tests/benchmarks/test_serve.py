"""The benchmark of the server runs three systems on a small model, and refuses wrong batches."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import generate, serve_clients
from benchmarks.__main__ import main
from benchmarks.generate import Decoder
from serving import need_serve

need_serve()
pytest.importorskip("openai", reason="the openai client is not installed")


def tiny(dtype: torch.dtype):
    from transformers import AutoModelForImageTextToText, Dinov2Config, LlamaConfig, LlavaConfig

    text = LlamaConfig(
        vocab_size=600,
        hidden_size=36,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        initializer_range=0.2,
    )
    tower = Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=14
    )
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=599)
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


@pytest.fixture
def models(monkeypatch):
    from benchmarks import serve

    monkeypatch.setattr(generate, "MODELS", {"demo": Decoder(tiny, r".*language_model.*\.(q_proj|v_proj)")})
    monkeypatch.setattr(serve, "IMAGE_TOKEN_ID", 599)
    return serve


@pytest.mark.slow
def test_rows_and_what_is_written(models, tmp_path, capsys):
    file = tmp_path / "serve.json"
    main(["serve", "--clients", "1", "3", "--requests", "4", "--tokens", "5", "--json", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [(r["system"], r["how"], r["clients"]) for r in rows] == [
        (system, how, clients)
        for system in ("base", "lora-merged", "rode")
        for how, clients in (("loop", 1), ("server", 1), ("server", 3))
    ]
    for found in rows:
        assert found["requests"] == found["same"] == 4
        assert found["tokens_per_second"] == pytest.approx(5 * found["requests_per_second"])
        assert 0 < found["first_token_median"] <= found["first_token_highest"]
    assert capsys.readouterr().out.count("generate in a loop") == 3


def test_a_wrong_batch_is_not_timed(models, monkeypatch):
    found = models.served(torch.float32, "cpu")
    assert len({s.name for s in found.values()}) == 3
    asked = models.questions(3)
    texts = [models.loop(model, asked, 6)[1] for model in found.values()]
    assert all(answer.tokens == 6 for answers in texts for answer in answers)
    assert len({answer.text for answers in texts for answer in answers}) > 6
    for model in found.values():
        models.check_batch(model, asked)
    join = found["base"].batch

    def unmasked(prepared, rows):
        return join(prepared, rows) | {"attention_mask": torch.ones_like(join(prepared, rows)["input_ids"])}

    monkeypatch.setattr(found["base"], "batch", unmasked)
    with pytest.raises(RuntimeError, match="base: row 0 of a batch is wrong"):
        models.check_batch(found["base"], asked)


def test_the_clients_are_light():
    assert "torch" not in vars(serve_clients)
