"""Tiny random checkpoints of the published vision-language families, each with its own processor.

Each folder loads as a published one does. Special tokens, templates and what ends a turn are the family's; sizes and
weights are not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from rode.vlm.processor import pictures_only
from vlm_text import (
    CHATML_TOKENS,
    DEFAULT_SYSTEM,
    QWEN_IMAGE,
    QWEN_TOKENS,
    TILE_TOKENS,
    chatml,
    tiny_tokenizer,
    write_template,
)

TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    # wide, so that a frozen random model has something to say and an adapter something to steer
    initializer_range=0.2,
)
VISION = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=16,
    patch_size=4,
    initializer_range=0.2,
)
# Qwen's towers name the same sizes in their own way
QWEN_VISION = dict(
    depth=2, num_heads=2, patch_size=4, temporal_patch_size=2, spatial_merge_size=2, initializer_range=0.2
)
QWEN_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN_IDS = dict(
    image_token_id="<|image_pad|>",
    video_token_id="<|video_pad|>",
    vision_start_token_id="<|vision_start|>",
    vision_end_token_id="<|vision_end|>",
)
PINPOINTS = [[16, 32], [32, 16], [32, 32]]


@dataclass(frozen=True)
class TinyVlm:
    """How a family's checkpoint is made.

    Attributes:
        config: (name of the configuration's class, its values); a value that is a special token becomes its id.
        tokenizer: what `tiny_tokenizer` takes.
        image_processor: makes the family's image processor (PIL's; torchvision's loads from the same file).
        turn_ends: the tokens at which generation stops, the one that ends an answer first.
        template: the chat template; None for a family that has none.
        processor: further arguments of the processor's class.
        video: the class name of the video half, which is saved by name only.
    """

    config: tuple[str, dict[str, Any]]
    tokenizer: dict[str, Any]
    image_processor: Callable[[], Any]
    turn_ends: tuple[str, ...]
    template: str | None = None
    processor: dict[str, Any] = field(default_factory=dict)
    video: str | None = None


def _square(cls: str, side: int = 16, **more: Any) -> Callable[[], Any]:
    return lambda: getattr(t, cls)(size={"height": side, "width": side}, **more)


def _with_attribute(make: Callable[[], Any], name: str, value: Any) -> Callable[[], Any]:
    def made() -> Any:
        thing = make()
        setattr(thing, name, value)
        return thing

    return made


def _qwen_vl(cls: str, video: str, vision: dict[str, Any], system: str = "") -> TinyVlm:
    return TinyVlm(
        config=(
            f"{cls}Config",
            dict(
                text_config={**TEXT, "rope_parameters": QWEN_ROPE},
                vision_config={**QWEN_VISION, **vision},
                **QWEN_IDS,
            ),
        ),
        tokenizer=dict(special=QWEN_TOKENS, eos="<|im_end|>", pad="<|endoftext|>"),
        image_processor=lambda: t.Qwen2VLImageProcessorPil(
            patch_size=4, temporal_patch_size=2, merge_size=2, min_pixels=16 * 16, max_pixels=32 * 32
        ),
        turn_ends=("<|im_end|>", "<|endoftext|>"),
        template=chatml(QWEN_IMAGE, system),
        video=video,
    )


def _idefics(cls: str, video: str | None, tokens: tuple[str, str, str], ends: tuple[str, ...]) -> TinyVlm:
    bos, eos, pad = tokens
    special = tuple(dict.fromkeys((bos, eos, pad, *TILE_TOKENS)))
    return TinyVlm(
        config=(
            f"{cls}Config",
            dict(
                vision_config=VISION,
                text_config={**TEXT, "model_type": "llama"},
                scale_factor=2,
                image_token_id="<image>",
            ),
        ),
        tokenizer=dict(special=special, bos=bos, eos=eos, pad=pad),
        image_processor=lambda: getattr(t, f"{cls}ImageProcessorPil")(
            size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
        ),
        turn_ends=ends,
        # SmolVLM's and Idefics3's differ in the first token alone
        template=write_template(
            "{Role}{% if m['content'] is string or m['content'][0]['type'] == 'text' %}: {% else %}:{% endif %}",
            "<image>",
            "{{ '<end_of_utterance>\\n' }}",
            "Assistant:",
            system=bos,
        ),
        processor=dict(image_seq_len=4),
        video=video,
    )


_LLAMA = dict(special=("<unk>", "<s>", "</s>", "<pad>", "<image>"), eos="</s>", pad="<pad>", bos="<s>")
_GEMMA = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")

_FAMILIES: dict[str, TinyVlm] = {
    "llava": TinyVlm(
        config=(
            "LlavaConfig",
            dict(
                vision_config={**VISION, "model_type": "clip_vision_model"},
                text_config={**TEXT, "model_type": "llama"},
                image_token_index="<image>",
            ),
        ),
        tokenizer=dict(**_LLAMA, puts_bos=True),
        image_processor=lambda: t.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
        turn_ends=("</s>",),
        template=write_template(
            "{% if m['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}",
            "{{ '<image>\\n' }}",
            "{% if m['role'] == 'user' %} {% else %}</s>{% endif %}",
            "ASSISTANT:",
        ),
        processor=dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1),
    ),
    "llava-next": TinyVlm(
        config=(
            "LlavaNextConfig",
            dict(
                vision_config={**VISION, "model_type": "clip_vision_model"},
                text_config={**TEXT, "model_type": "mistral"},
                image_token_index="<image>",
                image_grid_pinpoints=PINPOINTS,
            ),
        ),
        tokenizer=dict(**_LLAMA, puts_bos=True),
        image_processor=lambda: t.LlavaNextImageProcessorPil(
            size={"shortest_edge": 16},
            crop_size={"height": 16, "width": 16},
            image_grid_pinpoints=PINPOINTS,
        ),
        turn_ends=("</s>",),
        template=write_template(
            "{% if m['role'] == 'user' %}[INST] {% else %} {% endif %}",
            "{{ '<image>\\n' }}",
            "{% if m['role'] == 'user' %} [/INST]{% else %}</s>{% endif %}",
            "",
        ),
        processor=dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1),
    ),
    "llava-onevision": TinyVlm(
        config=(
            "LlavaOnevisionConfig",
            dict(
                vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
                text_config={**TEXT, "model_type": "qwen2"},
                image_token_index="<image>",
                video_token_index="<video>",
                image_grid_pinpoints=PINPOINTS,
            ),
        ),
        tokenizer=dict(special=(*CHATML_TOKENS, "<image>", "<video>"), eos="<|im_end|>", pad="<|endoftext|>"),
        image_processor=_square("LlavaOnevisionImageProcessorPil", image_grid_pinpoints=PINPOINTS),
        turn_ends=("<|im_end|>", "<|endoftext|>"),
        template=chatml("<image>"),
        processor=dict(num_image_tokens=16, vision_feature_select_strategy="full"),
        video="LlavaOnevisionVideoProcessor",
    ),
    "qwen2-vl": _qwen_vl(
        "Qwen2VL",
        "Qwen2VLVideoProcessor",
        dict(embed_dim=16, hidden_size=TEXT["hidden_size"], mlp_ratio=2),
        DEFAULT_SYSTEM,
    ),
    "qwen2.5-vl": _qwen_vl(
        "Qwen2_5_VL",
        "Qwen2VLVideoProcessor",
        dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=TEXT["hidden_size"],
            window_size=16,
            fullatt_block_indexes=[1],
        ),
        DEFAULT_SYSTEM,
    ),
    "qwen3-vl": _qwen_vl(
        "Qwen3VL",
        "Qwen3VLVideoProcessor",
        dict(
            hidden_size=16,
            intermediate_size=24,
            out_hidden_size=TEXT["hidden_size"],
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
    ),
    "smolvlm": _idefics(
        "SmolVLM",
        "SmolVLMVideoProcessor",
        ("<|im_start|>", "<end_of_utterance>", "<|im_end|>"),
        ("<end_of_utterance>",),
    ),
    "idefics3": _idefics(
        "Idefics3",
        None,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"),
        ("<end_of_utterance>", "<|end_of_text|>"),
    ),
    "paligemma": TinyVlm(
        config=(
            "PaliGemmaConfig",
            dict(
                vision_config={
                    **VISION,
                    "model_type": "siglip_vision_model",
                    "projection_dim": TEXT["hidden_size"],
                    "vision_use_head": False,
                },
                text_config={**TEXT, "model_type": "gemma", "head_dim": 8},
                image_token_index="<image>",
                projection_dim=TEXT["hidden_size"],
                hidden_size=TEXT["hidden_size"],
            ),
        ),
        tokenizer=dict(special=(*_GEMMA[:3], "<image>"), eos="<eos>", pad="<pad>", bos="<bos>"),
        image_processor=_with_attribute(_square("SiglipImageProcessorPil"), "image_seq_length", 16),
        turn_ends=("<eos>",),
    ),
    "gemma3": TinyVlm(
        config=(
            "Gemma3Config",
            dict(
                vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
                text_config={
                    **TEXT,
                    "head_dim": 8,
                    "query_pre_attn_scalar": 8,
                    "layer_types": ["sliding_attention", "full_attention"],
                },
                mm_tokens_per_image=4,
                image_token_index="<image_soft_token>",
                boi_token_index="<start_of_image>",
                eoi_token_index="<end_of_image>",
            ),
        ),
        tokenizer=dict(
            special=(*_GEMMA, "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
            eos="<eos>",
            pad="<pad>",
            bos="<bos>",
            puts_bos=True,
            image_token="<image_soft_token>",
            boi_token="<start_of_image>",
            eoi_token="<end_of_image>",
        ),
        image_processor=_square("Gemma3ImageProcessorPil"),
        turn_ends=("<end_of_turn>", "<eos>"),
        template=write_template(
            "{{ '<start_of_turn>' }}{role}{{ '\\n' }}",
            "<start_of_image>",
            "{{ '<end_of_turn>\\n' }}",
            "{{ '<start_of_turn>model\\n' }}",
            system="<bos>",
            model="model",
        ),
        processor=dict(image_seq_length=4),
    ),
    "internvl": TinyVlm(
        config=(
            "InternVLConfig",
            dict(
                vision_config={**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
                text_config={**TEXT, "model_type": "qwen2"},
                image_token_id="<IMG_CONTEXT>",
                image_seq_length=4,
            ),
        ),
        tokenizer=dict(
            special=(*CHATML_TOKENS, "<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
            eos="<|im_end|>",
            pad="<|endoftext|>",
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_processor=_square("GotOcr2ImageProcessorPil", crop_to_patches=True, max_patches=4),
        turn_ends=("<|im_end|>", "<|endoftext|>"),
        template=chatml("{{ '<IMG_CONTEXT>\\n' }}"),
        processor=dict(image_seq_length=4),
        video="InternVLVideoProcessor",
    ),
}
TINY_VLMS: tuple[str, ...] = tuple(_FAMILIES)


def save_tiny_vlm(name: str, folder: Path) -> Path:
    """Write a tiny random checkpoint of a family (one of `TINY_VLMS`), model and processor; the folder.

    The same weights every time. Skips the test where this transformers has no processor of the family without torchvision.
    """
    family = _FAMILIES[name]
    tokenizer = tiny_tokenizer(**family.tokenizer)
    ids = tokenizer.convert_tokens_to_ids
    special = set(family.tokenizer["special"])
    config_class, values = family.config
    values = {k: ids(v) if isinstance(v, str) and v in special else v for k, v in values.items()}
    # The processor first: PaliGemma's adds tokens.
    cls = PROCESSOR_MAPPING[getattr(t, config_class)]
    try:
        parts: list[Any] = [family.image_processor(), tokenizer]
    except ImportError as error:
        if "Torchvision" not in str(error):
            raise
        pytest.skip(f"transformers {t.__version__} has no processor for {name} without torchvision")
    more = {"chat_template": family.template, **family.processor}
    processor = _make(cls, parts, more, has_video=family.video is not None)
    common = dict(
        vocab_size=-(-len(tokenizer) // 8) * 8,  # padded, as published ones are
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    values["text_config"] = {**values["text_config"], **common}
    config = getattr(t, config_class)(**values)
    torch.manual_seed(0)
    model = t.AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if (
            weight.ndim > 1 and not weight.any()
        ):  # Gemma 3's projector begins at zero, so no picture would tell
            torch.nn.init.normal_(weight, std=0.2)
    model.generation_config = t.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[ids(token) for token in family.turn_ends],
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    if family.video is not None:
        video = {"video_processor_type": family.video}
        (Path(folder) / "video_preprocessor_config.json").write_text(json.dumps(video))
    return Path(folder)


def _make(cls: type[Any], parts: list[Any], more: dict[str, Any], *, has_video: bool) -> Any:
    return pictures_only(cls).from_args_and_dict([*parts, None], more) if has_video else cls(*parts, **more)
