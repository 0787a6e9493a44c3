"""A tiny random LLaVA with its processor, built from nothing: no network, no file of the project."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

IMAGE_SIZE = 28
DISHES = ("rice and beans", "soup", "apple pie")
PATCH = 14  # 2 x 2 patches: four image tokens
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer: 256 bytes, no merges, `<s>` put in front as Llama does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        symbol: index for index, symbol in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<image>", *alphabet])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        chat_template=chat_template,
    )


def tiny_processor(chat_template: str | None = None) -> LlavaProcessor:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessor(size=size, do_resize=True, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(chat_template),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def tiny_model(tower: str = "clip", seed: int = 0, vision_feature_layer: int | list[int] = -2):
    """LlavaForConditionalGeneration of some 50k parameters, float32. tower: "clip", "dinov2" or "siglip" (no CLS token)."""
    common = {
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH,
    }
    towers = {
        "clip": lambda: CLIPVisionConfig(intermediate_size=32, **common),
        "dinov2": lambda: Dinov2Config(mlp_ratio=2, **common),
        "siglip": lambda: SiglipVisionConfig(intermediate_size=32, **common),
    }
    vision = towers[tower]()
    text = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.2,  # wide, so that a frozen random model has something to say and an adapter something to steer
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=4,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        vision_feature_layer=vision_feature_layer,
    )
    return LlavaForConditionalGeneration(config).eval()


def save_tiny_llava(directory: Path, *, tower: str = "clip", chat_template: str | None = None) -> Path:
    """Write a checkpoint directory as `save_pretrained` does, model and processor."""
    tiny_model(tower).save_pretrained(directory)
    tiny_processor(chat_template).save_pretrained(directory)
    return directory


def draw(path: Path, colour: tuple[int, int, int], size: int = 40) -> Path:
    """A picture of one colour with a darker square, so that no two are alike."""
    image = Image.new("RGB", (size, size), colour)
    image.paste(tuple(c // 2 for c in colour), (size // 4, size // 4, size // 2, size // 2))
    image.save(path)
    return path
