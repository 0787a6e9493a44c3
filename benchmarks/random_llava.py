"""LLaVA-1.5 7B with random weights, and a few records: to run the paper's config where no checkpoint is.

    python -m benchmarks.random_llava FOLDER [--layers 32]

Writes FOLDER/model (14 GB in bfloat16) and FOLDER/records.jsonl with pictures. It takes some 2.5 GB of memory, whatever the size.
The tokenizer is a stand-in: one token for each byte, in a vocabulary of LLaVA's size. docs/training.md has the run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

SHARD = 1 << 30
DISHES = ("rice with beans", "tomato soup", "apple pie", "green salad")


def published_config(layers: int = 32) -> Any:
    """LLaVA-1.5 7B's configuration, with a language model of so many blocks."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(
        vocab_size=32064,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=32001,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)


def stand_in_tokenizer(image_token_id: int, pad_token_id: int) -> Any:
    """A token for each byte; the special tokens have LLaVA's ids, and the ids between are never used."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    vocabulary |= {"<image>": image_token_id, "<pad>": pad_token_id}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
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
    )


def save_random_llava(folder: Path, config: Any, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write a checkpoint of a LlavaConfig, shard by shard, as `save_pretrained` would; its number of parameters."""
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor

    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        size += shape.numel() * dtype.itemsize
        if size > SHARD and shards[-1]:
            shards.append([])
            size = shape.numel() * dtype.itemsize
        shards[-1].append(name)
    generator = torch.Generator().manual_seed(0)
    files = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {name: _random(name, shapes[name], dtype, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(names, file)
    parameters = sum(shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": parameters * dtype.itemsize}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config.architectures, config.dtype = [type(model).__name__], dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    side = config.vision_config.image_size
    LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ),
        tokenizer=stand_in_tokenizer(config.image_token_id, config.text_config.pad_token_id),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return parameters


def _random(name: str, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.zeros(shape, dtype=dtype) if name.endswith("bias") else torch.ones(shape, dtype=dtype)
    # activations keep their size through a linear layer
    scale = 1 / math.sqrt(shape[1:].numel())
    return torch.empty(shape, dtype=dtype).normal_(0, scale, generator=generator)


def save_records(folder: Path, records: int = 8, side: int = 336) -> Path:
    """Write records.jsonl, all for training, with pictures of coloured squares."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = random.Random(0)
    lines = []
    for i in range(records):
        small = Image.frombytes("RGB", (8, 8), dice.randbytes(8 * 8 * 3))
        small.resize((side, side), Image.Resampling.NEAREST).save(folder / f"{i}.png")
        record = {
            "id": f"dish{i}",
            "image": f"{i}.png",
            "source": "random",
            "category": DISHES[i % len(DISHES)],
            "ingredients": [{"name": "rice"}, {"name": "beans"}],
            "instructions": ["Boil the rice in plenty of salted water.", "Stir in the beans."],
            "nutrition": {"mass": 100, "energy": 200, "fat": 3, "protein": 4, "carb": 5 + i},
            "split": "train",
        }
        lines.append(json.dumps(record) + "\n")
    file = folder / "records.jsonl"
    file.write_text("".join(lines))
    return file


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_llava",
        description="Write LLaVA-1.5 7B with random weights, and records.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32, help="blocks of the language model (default 32)")
    options = parser.parse_args(arguments)
    parameters = save_random_llava(options.folder / "model", published_config(options.layers))
    save_records(options.folder)
    print(
        f"{options.folder}/model: {parameters:,} parameters; {options.folder}/records.jsonl: records to train on"
    )


if __name__ == "__main__":
    main()
