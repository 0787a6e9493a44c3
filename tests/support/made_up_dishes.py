"""Small sets of made-up dishes with pictures of their own, for tests of what reads, builds and trains on records."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from rode_food.records import FoodRecord, Ingredient, write_records

TITLES = (
    "Tomato Soup",
    "Onion soup with bread",
    "Chicken Curry",
    "Red curry",
    "Apple Pie",
    "Pecan Pie",
    "Green Salad",
)
FOODS = {
    # per 100 g: energy kcal, fat, protein, carbohydrate, g
    "tomato": (18, 0.2, 0.9, 3.9),
    "onion": (40, 0.1, 1.1, 9.3),
    "butter": (717, 81.0, 0.9, 0.1),
    "chicken": (165, 3.6, 31.0, 0.0),
    "flour": (364, 1.0, 10.3, 76.3),
    "apple": (52, 0.2, 0.3, 13.8),
    "cheese": (403, 33.1, 24.9, 1.3),
}


def paint(path: Path, seed: int, size: int = 96, quality: int = 90) -> Path:
    """A picture that looks like no other: coloured discs on a ground, by seed alone."""
    dice = random.Random(seed)
    image = Image.new("RGB", (size, size), tuple(dice.randrange(256) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, r = (dice.random() * size for _ in range(3))
        colour = tuple(dice.randrange(256) for _ in range(3))
        draw.ellipse((x - r / 3, y - r / 3, x + r / 3, y + r / 3), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=quality)
    return path


def dishes(
    folder: Path, count: int, *, seed: int = 0, splits: Sequence[str] = ("train", "train", "val", "test")
) -> Path:
    """`folder/records.jsonl` with `count` records and their pictures; ingredients in grams, out of FOODS."""
    dice = random.Random(seed)
    records = []
    for i in range(count):
        chosen = [
            (name, dice.randrange(20, 300)) for name in dice.sample(sorted(FOODS), dice.randrange(2, 5))
        ]
        records.append(
            FoodRecord(
                id=f"dish{i:05d}",
                image=str(paint(folder / "images" / f"{i:05d}.jpg", seed * 1_000_003 + i)),
                source="made-up",
                title=dice.choice(TITLES),
                ingredients=tuple(
                    Ingredient(n, float(g), "g", float(g), text=f"{g} g {n}") for n, g in chosen
                ),
                instructions=("Cut everything.", "Cook it until it is done."),
                split=splits[i % len(splits)],
            )
        )
    write_records(folder / "records.jsonl", records)
    return folder / "records.jsonl"
