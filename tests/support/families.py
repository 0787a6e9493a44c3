"""Tiny random models of the families that adapters are tried on, and an input for each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import nn

VOCABULARY = 64
TEXT = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=8,
    patch_size=4,
)
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}


def _llava(cls: str, text: Any = None, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(t, f"{cls}Config")(
            vision_config=t.CLIPVisionConfig(**VISION),
            text_config=text or t.LlamaConfig(**TEXT),
            image_token_index=60,
            **more,
        )
        return getattr(t, f"{cls}ForConditionalGeneration")(config)

    return make


def _qwen_vl(cls: str, **vision: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        config = getattr(t, f"{cls}Config")(
            text_config={**TEXT, "rope_parameters": ROPE},
            vision_config=vision,
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=58,
            vision_end_token_id=59,
        )
        return getattr(t, f"{cls}ForConditionalGeneration")(config)

    return make


def _idefics(cls: str) -> Callable[[], nn.Module]:
    text = {**TEXT, "model_type": "llama"}
    values = dict(vision_config=VISION, text_config=text, scale_factor=2, image_token_id=60)
    return _of(f"{cls}ForConditionalGeneration", f"{cls}Config", **values)


def _of(cls: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(t, cls)(getattr(t, config)(**values))


IDS_OF_TEXT = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava("Llava"),
    "llava-next": _llava("LlavaNext", image_grid_pinpoints=[[8, 8]]),
    "llava-onevision": _llava("LlavaOnevision", image_grid_pinpoints=[[8, 8]], video_token_index=61),
    "qwen2-vl": _qwen_vl("Qwen2VL", depth=2, embed_dim=16, hidden_size=16, num_heads=2, patch_size=4),
    "qwen2.5-vl": _qwen_vl(
        "Qwen2_5_VL",
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=16,
        num_heads=2,
        patch_size=4,
        fullatt_block_indexes=[1],
    ),
    "qwen3-vl": _qwen_vl(
        "Qwen3VL",
        depth=2,
        hidden_size=16,
        intermediate_size=24,
        out_hidden_size=16,
        num_heads=2,
        patch_size=4,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    ),
    "smolvlm": _idefics("SmolVLM"),
    "idefics3": _idefics("Idefics3"),
    "paligemma": _of(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        vision_config={**VISION, "model_type": "siglip_vision_model", "projection_dim": 16},
        text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
        image_token_index=60,
        projection_dim=16,
        hidden_size=16,
    ),
    "gemma3": _of(
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        text_config={**TEXT, "head_dim": 8},
        mm_tokens_per_image=4,
        image_token_index=60,
    ),
    "internvl": _of(
        "InternVLForConditionalGeneration",
        "InternVLConfig",
        vision_config={**VISION, "image_size": [8, 8], "patch_size": [4, 4]},
        text_config={**TEXT, "model_type": "qwen2"},
        image_token_id=60,
    ),
    "mllama": _of(
        "MllamaForConditionalGeneration",
        "MllamaConfig",
        vision_config=dict(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_global_layers=1,
            attention_heads=2,
            image_size=8,
            patch_size=4,
            max_num_tiles=2,
            intermediate_layers_indices=[0],
            supported_aspect_ratios=[[1, 1], [1, 2]],
            vision_output_dim=32,
        ),
        text_config={**TEXT, "cross_attention_layers": [1], "num_hidden_layers": 2},
        image_token_index=60,
    ),
    "llama": _of("LlamaForCausalLM", "LlamaConfig", **TEXT),
    "phi3": _of("Phi3ForCausalLM", "Phi3Config", **TEXT),
    "gpt2": _of(
        "GPT2LMHeadModel", "GPT2Config", n_embd=16, n_layer=2, n_head=2, vocab_size=VOCABULARY, **IDS_OF_TEXT
    ),
    "opt": _of(
        "OPTForCausalLM",
        "OPTConfig",
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
        word_embed_proj_dim=16,
        **IDS_OF_TEXT,
    ),
    "t5": _of(
        "T5ForConditionalGeneration",
        "T5Config",
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    ),
    "bert": _of(
        "BertForMaskedLM",
        "BertConfig",
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=VOCABULARY,
    ),
    "whisper": _of(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=20,
        decoder_start_token_id=1,
        **IDS_OF_TEXT,
    ),
}


def family(name: str) -> nn.Module:
    """The same tiny random model of a family every time, in evaluation mode."""
    torch.manual_seed(0)
    model = FAMILIES[name]().eval()
    for part, parameter in model.named_parameters():
        if part.endswith("_gate"):  # Mllama's cross-attention, which adds nothing at first
            nn.init.constant_(parameter, 0.5)
    return model


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Two rows of ten tokens (for Whisper, of sound), with labels; for Mllama a picture in each row, of one tile and of two."""
    ids = torch.arange(3, 23).view(2, 10)
    if name == "whisper":
        return {"input_features": torch.linspace(-1, 1, 2 * 8 * 20).view(2, 8, 20), "labels": ids}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    if name == "mllama":
        tiles = torch.tensor([[[1, 0]], [[1, 1]]])  # by row and picture
        batch |= {
            "pixel_values": torch.linspace(-1, 1, 2 * 2 * 3 * 8 * 8).view(2, 1, 2, 3, 8, 8),
            "aspect_ratio_ids": torch.tensor([[1], [2]]),
            "aspect_ratio_mask": tiles,
            "cross_attention_mask": tiles[:, None].repeat(1, 10, 1, 1),
        }
        batch["cross_attention_mask"][:, :2] = 0  # the first tokens come before the picture
    if name in ("paligemma", "gemma3"):  # before transformers 5.6 they do not train without
        batch["token_type_ids"] = torch.zeros_like(ids)
    return batch
