"""A tiny LLaVA checkpoint and a few records with pictures, made anew for each test session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rode_food import Example
from tiny_llava import DISHES, draw, save_tiny_llava

IMAGE_TOKEN = 100


def _tiny_llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=101,
        initializer_range=0.2,  # wide enough that q and v alone can fit a batch
        pad_token_id=0,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, vision_feature_layer=-1
    )
    torch.manual_seed(1)
    return LlavaForConditionalGeneration(config)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products gain nothing from threads, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: random CLIP tower and Llama, float32."""
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def examples(food: Path) -> list[Example]:
    """A question about the category of each training record."""
    return [
        Example(
            f"dish{i}",
            str(food / f"{i}.png"),
            "category",
            "What is it?",
            DISHES[i % 3],
            DISHES[i % 3],
            "s",
            "train",
        )
        for i in range(12)
    ]


@pytest.fixture
def make_experiment(llava_dir: Path, food: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a quick config; training=, model=, ... update its sections."""
    from rode.training.config import experiment_from_dict

    def make(**changes: Any) -> Any:
        values: dict[str, Any] = {
            "name": "tiny",
            "output_dir": str(tmp_path / "run"),
            "model": {"path": str(llava_dir), "device": "cpu", "dtype": "float32", "prompt": "vicuna"},
            "data": {"sources": [{"path": str(food / "records.jsonl")}], "wording": "first"},
            "adapter": {"ranks": [2, 4]},
            "training": {
                "learning_rate": 3e-3,
                "batch_size": 4,
                "gradient_accumulation": 1,
                "warmup_steps": 1,
                "max_steps": 6,
                "logging_steps": 1,
                "save_steps": 100,
            },
        }
        for key, value in changes.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) and value else value
        if values.get("stage") == "projector":
            del values["adapter"]
        return experiment_from_dict(values)

    return make


@pytest.fixture(scope="session")
def taught(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(TrainResult, examples): an adapter and projector that tell three dishes apart by their colour."""
    from rode.training.config import experiment_from_dict
    from rode.training.train import train

    folder = tmp_path_factory.mktemp("taught")
    colours = ((220, 30, 30), (30, 220, 30), (30, 30, 220))
    examples = []
    for i in range(6):
        colour = tuple(min(255, c + 5 * (i // 3)) for c in colours[i % 3])
        picture, dish = str(draw(folder / f"{i}.png", colour)), DISHES[i % 3]
        examples.append(Example(f"dish{i}", picture, "category", "What is it?", dish, dish, "s", "train"))
    training = {
        "learning_rate": 1e-2,
        "projector_learning_rate": 1e-2,
        "batch_size": 6,
        "gradient_accumulation": 1,
        "warmup_steps": 5,
        "max_steps": 90,  # 60 are too few with the random weights of some versions of transformers
        "logging_steps": 20,
    }
    experiment = experiment_from_dict(
        {
            "name": "taught",
            "output_dir": str(folder / "run"),
            "model": {"path": str(llava_dir), "device": "cpu", "dtype": "float32", "prompt": "vicuna"},
            "data": {"sources": [{"path": "unused.jsonl"}]},
            "adapter": {"ranks": [4, 8], "dropout": 0.0, "target_modules": ".*language_model.*_proj"},
            "training": training,
        }
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = train(experiment, examples=examples, progress=False)
    torch.set_num_threads(threads)
    return result, examples


@pytest.fixture
def tiny_llava():
    """A function that builds the same LLaVA (CLIP tower, projector, Llama) every time."""
    return _tiny_llava


@pytest.fixture
def llava_batch():
    """Two rows, one left-padded by 2: [pad pad] bos, 4 image tokens, then text; as keyword arguments of the model."""
    image = [IMAGE_TOKEN] * 4
    ids = torch.tensor([[1, *image, 5, 6, 7, 8], [0, 0, 1, *image, 9, 10]])
    torch.manual_seed(2)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(2, 3, 28, 28),
    }
