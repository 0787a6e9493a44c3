"""A made-up Recipe1M of any size, in the layout of the real one: for measuring and for tests.

Every recipe follows from (seed, its number) alone, so that what a reader gives can be checked without keeping anything.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

AMOUNTS = ("1", "2", "1/2", "1 1/2", "2-3")
UNITS = ("cup", "cups", "teaspoon", "tablespoons", "g", "ml", "ounces", "lb", "pinch", "cloves", "")
# fmt: off
FOODS = (
    "all-purpose flour", "butter", "granulated sugar", "salt", "black pepper", "olive oil", "garlic",
    "onions", "eggs", "whole milk", "cheddar cheese", "chicken breasts", "ground beef", "basmati rice",
    "tomatoes", "potatoes", "carrots", "celery", "parsley", "lemon juice", "soy sauce", "honey",
    "vanilla extract", "baking powder", "cinnamon", "heavy cream", "spinach", "mushrooms",
    "red bell pepper", "cilantro", "ginger", "jalapeño",
)
# fmt: on
PREPARED = (
    "",
    ", chopped",
    ", finely sliced",
    ", melted",
    ", at room temperature",
    " (optional)",
    ", drained",
)
VERBS = ("Mix", "Chop", "Simmer", "Bake", "Stir in", "Season", "Drain", "Whisk", "Fry", "Cover")
PARTITIONS = ("train",) * 7 + ("val", "test", "test")  # near the real 70 : 15 : 15
LINKS = 60_000  # of one file; ext4 has room for 65,000
_SIDE = 32  # pixels of a picture


def recipe_id(number: int, seed: int = 0) -> str:
    """Ten hexadecimal digits, as the real ones, spread evenly."""
    return hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=5).hexdigest()


def recipe(number: int, seed: int = 0) -> dict[str, Any]:
    """layer1's entry. About 1.4 kB of JSON, as the real ones."""
    draw = random.Random(f"{seed}/{number}")
    chosen = draw.sample(FOODS, draw.randint(4, 14))
    # half of the lines are like no other, so that a reader's memory of lines does not flatter it
    amounts = [draw.choice((draw.choice(AMOUNTS), f"{draw.randint(1, 9999) / 10:g}")) for _ in chosen]
    lines = [
        f"{amount} {draw.choice(UNITS)} {food}{draw.choice(PREPARED)}"
        for amount, food in zip(amounts, chosen, strict=True)
    ]
    steps = [
        f"{draw.choice(VERBS)} the {' and the '.join(draw.sample(chosen, 3))} for {draw.randint(1, 90)} minutes, then let "
        "it rest until it can be handled."
        for _ in range(draw.randint(3, 12))
    ]
    return {
        "ingredients": [{"text": " ".join(line.split())} for line in lines],
        "url": f"http://www.example.com/recipe/{number}",
        "partition": draw.choice(PARTITIONS),
        "title": f"{chosen[0].title()} with {chosen[1]} {number}",
        "id": recipe_id(number, seed),
        "instructions": [{"text": step} for step in steps],
    }


def names(entry: dict[str, Any], number: int, seed: int = 0) -> dict[str, Any]:
    """det_ingrs' entry for a recipe: the food of each line; one in eight is not valid."""
    draw = random.Random(f"names/{seed}/{number}")
    found = [
        max((food for food in FOODS if food in item["text"]), key=len, default="")
        for item in entry["ingredients"]
    ]
    return {
        "valid": [bool(food) and draw.random() < 0.875 for food in found],
        "id": entry["id"],
        "ingredients": [{"text": food} for food in found],
    }


def picture_name(identifier: str, number: int) -> str:
    return hashlib.blake2b(f"{identifier}#{number}".encode(), digest_size=5).hexdigest() + ".jpg"


def write_recipe1m(
    folder: Path,
    recipes: int,
    *,
    seed: int = 0,
    pictures: int = 1,
    link: str = "hard",
    images: str = "images",
    per_line: bool = True,
) -> None:
    """Writes layer1.json, layer2.json, det_ingrs.json and images/a/b/c/d/IMG.jpg; holds one recipe at a time.

    Args:
        folder: made; it must not hold these files yet.
        recipes: how many; `recipe` gives each.
        pictures: of every recipe.
        link: "hard" or "symbolic": pictures are links to a few files in `folder/pictures`.
        images: folder of the pictures; "{partition}" in it stands for the recipe's.
        per_line: an entry a line; else all on one.
    """
    sources = _pictures(folder / "pictures", recipes * pictures // LINKS + 1)
    layers = [
        (folder / f"{name}.json").open("x", encoding="utf-8") for name in ("layer1", "layer2", "det_ingrs")
    ]
    made: set[str] = set()
    linked = 0
    for number in range(recipes):
        entry = recipe(number, seed)
        shots = [picture_name(entry["id"], shot) for shot in range(pictures)]
        of_layer2 = {
            "id": entry["id"],
            "images": [{"url": f"http://www.example.com/{s}", "id": s} for s in shots],
        }
        for layer, value in zip(layers, (entry, of_layer2, names(entry, number, seed)), strict=True):
            layer.write(("," if number else "[") + ("\n" if per_line else " ") + json.dumps(value))
        for shot in shots:
            below = f"{folder}/{images.format(partition=entry['partition'])}/{'/'.join(shot[:4])}"
            if below not in made:
                os.makedirs(below, exist_ok=True)
                made.add(below)
            make = os.link if link == "hard" else os.symlink
            make(sources[linked // LINKS], f"{below}/{shot}")
            linked += 1
    for layer in layers:
        layer.write("]\n" if recipes else "[]\n")
        layer.close()


def _pictures(folder: Path, count: int) -> Sequence[Path]:
    from PIL import Image

    folder.mkdir(parents=True)
    for number in range(count):
        shade = Image.linear_gradient("L").resize((_SIDE, _SIDE)).rotate(90 * number)
        buffer = io.BytesIO()
        shade.convert("RGB").save(buffer, "JPEG")
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
    return [(folder / f"{number}.jpg").resolve() for number in range(count)]


def digest(rows: Iterator[tuple[str, str | None, int, int]]) -> str:
    """A digest of (id, title, number of ingredient lines, number of steps) of recipes in their order."""
    total = hashlib.sha256()
    for row in rows:
        total.update(repr(row).encode())
    return total.hexdigest()


def expected_digest(recipes: int, seed: int = 0) -> str:
    """The digest that a reader gets if it loses nothing."""
    entries = (recipe(number, seed) for number in itertools.islice(itertools.count(), recipes))
    return digest((e["id"], e["title"], len(e["ingredients"]), len(e["instructions"])) for e in entries)
