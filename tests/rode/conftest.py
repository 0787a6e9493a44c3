"""A tiny LLaVA checkpoint and a few records with pictures, made anew for each test session."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rode.data import Example
from tiny_llava import draw, save_tiny_llava

DISHES = ("rice and beans", "soup", "apple pie")


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


@pytest.fixture(scope="session")
def food(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records.jsonl with 12 training and 4 test records of two sources, and their pictures."""
    folder = tmp_path_factory.mktemp("food")
    with (folder / "records.jsonl").open("w") as out:
        for i in range(16):
            draw(folder / f"{i}.png", (15 * i, 255 - 15 * i, 100))
            record = {
                "id": f"dish{i}",
                "image": f"{i}.png",
                "source": "left" if i % 2 else "right",
                "category": DISHES[i % 3],
                "ingredients": [{"name": "rice"}, {"name": f"leaf {i % 2}"}],
                "instructions": ["Boil it in plenty of salted water."],
                "nutrition": {"mass": 100, "energy": 200, "fat": 3, "protein": 4, "carb": 5 + i},
                "split": "train" if i < 12 else "test",
            }
            out.write(json.dumps(record) + "\n")
    return folder


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
def make_recipe(llava_dir: Path, food: Path, tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a quick recipe; training=, model=, ... update its sections."""
    from rode.recipe import recipe_from_dict

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
        return recipe_from_dict(values)

    return make


@pytest.fixture(scope="session")
def taught(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(TrainResult, examples): an adapter and projector that tell three dishes apart by their colour."""
    from rode.recipe import recipe_from_dict
    from rode.train import train

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
    recipe = recipe_from_dict(
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
    result = train(recipe, examples=examples, progress=False)
    torch.set_num_threads(threads)
    return result, examples
