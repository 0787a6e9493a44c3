"""The configs for published models, on models of the published sizes without weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from peft import get_peft_model

from rode.training.config import adapter_config, load_experiment
from rode.tuner import RodeLayer

CONFIGS = Path(__file__).parents[3] / "configs"
SIGLIP = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16)
CLIP_336 = dict(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)


@dataclass(frozen=True)
class Published:
    """A published model's sizes: the configuration, billions of parameters, the language model's projections, and what is
    trained (docs/training.md)."""

    config: Any
    billions: float
    language_model: str
    layers: int
    hidden: int
    q: int
    v: int
    trained: int


PUBLISHED = {
    "qwen2.5-vl-7b": Published(
        t.Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=3584,
                intermediate_size=18944,
                num_hidden_layers=28,
                num_attention_heads=28,
                num_key_value_heads=4,
                vocab_size=152064,
                rope_parameters={
                    "rope_type": "default",
                    "mrope_section": [16, 24, 24],
                    "rope_theta": 1e6,
                },
            ),
            vision_config=dict(
                depth=32,
                hidden_size=1280,
                intermediate_size=3420,
                num_heads=16,
                out_hidden_size=3584,
                patch_size=14,
                window_size=112,
                fullatt_block_indexes=[7, 15, 23, 31],
            ),
            tie_word_embeddings=False,
        ),
        billions=8.29,
        language_model="model.language_model",
        layers=28,
        hidden=3584,
        q=28 * 128,
        v=4 * 128,
        trained=10_264_576,
    ),
    "llava-next-7b": Published(
        t.LlavaNextConfig(
            text_config=dict(
                model_type="mistral",
                hidden_size=4096,
                intermediate_size=14336,
                num_hidden_layers=32,
                num_attention_heads=32,
                num_key_value_heads=8,
                vocab_size=32064,
            ),
            vision_config=CLIP_336,
        ),
        billions=7.57,
        language_model="model.language_model",
        layers=32,
        hidden=4096,
        q=32 * 128,
        v=8 * 128,
        trained=13_828_096,
    ),
    "gemma3-4b": Published(
        t.Gemma3Config(
            text_config=dict(
                hidden_size=2560,
                intermediate_size=10240,
                num_hidden_layers=34,
                num_attention_heads=8,
                num_key_value_heads=4,
                head_dim=256,
                vocab_size=262208,
            ),
            vision_config=dict(**SIGLIP, image_size=896, patch_size=14, vision_use_head=False),
            mm_tokens_per_image=256,
        ),
        billions=4.30,
        language_model="model.language_model",
        layers=34,
        hidden=2560,
        q=8 * 256,
        v=4 * 256,
        trained=9_052_160,
    ),
    "smolvlm-2b": Published(
        t.SmolVLMConfig(
            text_config=dict(
                model_type="llama",
                hidden_size=2048,
                intermediate_size=8192,
                num_hidden_layers=24,
                num_attention_heads=32,
                num_key_value_heads=32,
                vocab_size=49280,
            ),
            vision_config=dict(**SIGLIP, image_size=384, patch_size=14),
            scale_factor=3,
            tie_word_embeddings=False,
        ),
        billions=2.25,
        language_model="model.text_model",
        layers=24,
        hidden=2048,
        q=32 * 64,
        v=32 * 64,
        trained=6_291_456,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_models_config(name):
    """The adapter goes on q and v of the language model, not the tower's, and trains what the formula says."""
    published = PUBLISHED[name]
    experiment = load_experiment(CONFIGS / f"{name}.yaml")
    assert experiment.name == name
    assert experiment.training.batch_size * experiment.training.gradient_accumulation == 8
    assert experiment.data == load_experiment(CONFIGS / "own-records.yaml").data
    with torch.device("meta"):
        model = t.AutoModelForImageTextToText.from_config(published.config)
        total = sum(p.numel() for p in model.parameters())
        assert round(total / 1e9, 2) == published.billions
        model = get_peft_model(model, adapter_config(experiment))

    layers = {n: m for n, m in model.named_modules() if isinstance(m, RodeLayer)}
    assert set(layers) == {
        f"base_model.model.{published.language_model}.layers.{i}.self_attn.{p}_proj"
        for i in range(published.layers)
        for p in "qv"
    }
    for layer in layers.values():
        assert layer.adapter("default").ranks == (2, 4, 8, 16)
        assert layer.adapter("default").scaling == (8.0, 4.0, 2.0, 1.0)
    # each projection: A 30 x hidden, B out x 30, router 4 x hidden
    total_rank, experts = sum((2, 4, 8, 16)), 4
    formula = published.layers * sum(
        total_rank * published.hidden + out * total_rank + experts * published.hidden
        for out in (published.q, published.v)
    )
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == formula == published.trained
    assert all(p.dtype == torch.float32 for p in trained.values())
