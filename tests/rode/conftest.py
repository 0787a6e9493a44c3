"""A tiny LLaVA checkpoint and a few records with pictures, made anew for each test session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rode.data import Example
from tiny_llava import draw, save_tiny_llava

DISHES = ("rice and beans", "soup", "apple pie")


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
                "instructions": ["Boil it."],
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
