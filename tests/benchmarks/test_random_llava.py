"""The random LLaVA loads as a published one, its tokenizer has LLaVA's ids, and its records are records."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import random_llava
from rode.vlm import load_vlm
from rode_food.records import read_records


@pytest.fixture
def small():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **sizes),
        text_config=LlamaConfig(
            vocab_size=320, bos_token_id=1, eos_token_id=2, pad_token_id=301, num_key_value_heads=2, **sizes
        ),
        image_token_id=300,
    )


def test_it_loads_as_a_published_checkpoint_does(tmp_path, small, monkeypatch):
    monkeypatch.setattr(random_llava, "SHARD", 20_000)
    parameters = random_llava.save_random_llava(tmp_path, small)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)[1]
    assert not any(loaded.values()), loaded  # no key is missing, none is too many
    model, processor = load_vlm(tmp_path, dtype="bfloat16", device="cpu")
    assert sum(p.numel() for p in model.parameters()) == parameters
    tokenizer = processor.tokenizer
    assert tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<image>", "<pad>"]) == [1, 2, 300, 301]
    assert tokenizer.decode(tokenizer("Crème 2%", add_special_tokens=False).input_ids) == "Crème 2%"


def test_records_can_be_trained_on(tmp_path):
    records = list(read_records(random_llava.save_records(tmp_path, records=3, side=32)))
    assert len(records) == 3
    assert {record.split for record in records} == {"train"}


def test_the_published_size():
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(random_llava.published_config())
    assert sum(p.numel() for p in model.parameters()) == 7_063_427_072


def test_the_command(tmp_path, monkeypatch, small, capsys):
    monkeypatch.setattr(random_llava, "published_config", lambda layers: small)
    random_llava.main([str(tmp_path)])
    assert (tmp_path / "model" / "config.json").is_file()
    assert "parameters" in capsys.readouterr().out
