"""Made-up records with pictures, whose fields are there or not in turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from rode_food.records import FoodRecord, Ingredient, Nutrition, Quantity

IDS = ("a/b", "../up", "x.tar", "-rf", "naïve 粥", "A B", "a%2Fb", "n" * 300)
"""Ids that a file could not be called."""


def picture(path: Path, number: int, kind: str = "JPEG", size: int = 24) -> str:
    """A picture of noise, no two alike."""
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return str(path)


def dish(folder: Path, number: int, *, split: str | None = None, id: str | None = None) -> FoodRecord:
    """Record number N: every third picture a PNG, every fifth has micronutrients, every fourth no recipe."""
    kind = "PNG" if number % 3 == 2 else "JPEG"
    suffix = {"PNG": "png", "JPEG": "jpg"}[kind]
    micro = {f"vitamin {number % 7}": Quantity(0.5 + number, "ug"), "sodium": Quantity(480.0, "mg")}
    full = Nutrition(100.0 + number, 200.5, 3.0, 0.0, 5.25, micro if number % 5 == 0 else {})
    return FoodRecord(
        id=id or (IDS[number] if number < len(IDS) else f"dish{number}"),
        image=picture(folder / f"{number}.{suffix}", number, kind),
        source="left" if number % 2 else "right",
        title=f"Dish {number}" if number % 2 else None,
        category=("soup", "apple pie", None)[number % 3],
        ingredients=(
            Ingredient("rice", 1.0 + number, "cup", 158.0, Nutrition(energy=205.0), "one cup of rice"),
            Ingredient(f"leaf {number % 4}"),
        ),
        instructions=() if number % 4 == 3 else ("Boil it.", f"Wait {number} minutes."),
        nutrition=full if number % 2 else None,
        split=split or ("train" if number % 5 else "test"),
    )


def dishes(folder: Path, count: int, **fields: str | None) -> list[FoodRecord]:
    folder.mkdir(parents=True, exist_ok=True)
    return [dish(folder, number, **fields) for number in range(count)]
