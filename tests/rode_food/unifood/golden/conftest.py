"""A golden stage over a handful of labelled dishes and the made-up food table."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from golden_engine import Serial
from rode_food.records import FoodRecord, Ingredient, Nutrition, write_records
from rode_food.unifood.golden.settings import GoldenSettings
from rode_food.unifood.stage import Stage
from rode_food.usda.estimate import shared_estimator
from tagger import need_tagger
from tiny_usda import REAL_NUMBERS, write_sr28_csv


def part(
    name: str, mass: float, energy: float, fat: float, protein: float, carb: float, text: str
) -> Ingredient:
    return Ingredient(name, mass=mass, nutrition=Nutrition(mass, energy, fat, protein, carb), text=text)


FLOUR = part("flour", 120, 420, 1.2, 12, 90, "1 cup flour")
KILOJOULES = part("flour", 120, 420 * 4.184, 1.2, 12, 90, "1 cup flour")
TOO_MUCH = part("flour", 480, 1680, 4.8, 48, 360, "1 cup flour")
UNKNOWN = part("stardust", 100, 300, 1, 1, 50, "100 g stardust")


def record(
    id: str, image: str, *parts: Ingredient, category: str | None = None, split: str = "test"
) -> FoodRecord:
    sums = [sum(getattr(p.nutrition, f) for p in parts) for f in ("mass", "energy", "fat", "protein", "carb")]
    return FoodRecord(
        id,
        image,
        "s",
        title=f"<i>{id}",
        category=category,
        ingredients=parts,
        nutrition=Nutrition(*sums),
        split=split,
    )


@pytest.fixture
def make_stage(tmp_path: Path) -> Any:
    """A function (engine=, dry_run=, **settings) -> Stage; its records are written once."""
    need_tagger()
    usda = tmp_path / "usda"
    usda.mkdir()
    write_sr28_csv(usda, REAL_NUMBERS)
    Image.new("RGB", (640, 480), (200, 30, 30)).save(tmp_path / "red.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    records = [
        record("good", "red.png", FLOUR, category="bread"),
        record("kilojoules", "red.png", KILOJOULES, category="bread"),
        record("heavy", "red.png", TOO_MUCH, category="bread"),
        record("unknown", "red.png", UNKNOWN),
        FoodRecord("bare", "red.png", "s", ingredients=(Ingredient("flour"),), split="test"),
        record("trained", "red.png", KILOJOULES, split="train"),
        record("broken", "broken.jpg", FLOUR, category="other"),
        *(record(f"more{i}", "red.png", FLOUR, category="bread") for i in range(4)),
        *(record(f"others{i}", "red.png", FLOUR, category="other") for i in range(4)),
    ]
    write_records(tmp_path / "source.jsonl", records)
    folder = tmp_path / "golden"
    folder.mkdir()

    def make(
        engine: Any = None, dry_run: bool = False, folder: Path = folder, key: str = "", **settings: Any
    ) -> Stage:
        shared_estimator.cache_clear()
        defaults = {"usda": os.fspath(usda), "max_category_share": None}
        golden = GoldenSettings(**(defaults | settings))
        return Stage(
            name="golden",
            folder=folder,
            source=tmp_path / "source.jsonl",
            settings=SimpleNamespace(golden=golden),
            engine=engine or Serial(),
            progress=False,
            dry_run=dry_run,
            key=key,
        )

    return make
