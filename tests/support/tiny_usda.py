"""A made-up food table of a few foods, and the names that mean them."""

from __future__ import annotations

import csv
from pathlib import Path

from rode_food.usda import Food, FoodTable, Portion
from rode_food.usda.names import CommonFood, normalise

FOODS = (
    # id, description, group, energy, fat, protein, carb, portions (amount, measure, grams)
    ("00001", "Flour, test", "Grains", 350, 1, 10, 75, [(1, "cup", 120), (1, "cup, sifted", 100), (1, "lb", 454)]),
    ("00002", "Egg, test, raw", "Eggs", 140, 10, 12, 1, [(1, "large", 50), (1, "medium", 44), (1, "cup (5 large)", 243)]),
    ("00003", "Garlic, test", "Vegetables", 150, 0.5, 6, 33, [(1, "tsp", 2.8), (3, "cloves", 9)]),
    ("00004", "Broth, test", "Soups", 10, 0.5, 1, 0.5, [(1, "serving 1 can (300 g)", 300)]),
    ("00005", "Oil, test", "Fats", 884, 100, 0, 0, [(1, "tablespoon", 13.5), (1, "cup", 216), (0.5, "pat", 2)]),
    ("00006", "Pepper, sweet, test", "Vegetables", 30, 0.3, 1, 6, [(1, "large", 164), (1, "medium", 119), (10, "strips", 27)]),
    ("00007", "Rice, test, raw", "Grains", 360, 0.6, 7, 80, [(1, "cup", 185), (0.25, "cup, dry, yields", 40)]),
    ("00008", "Rice, test, cooked", "Grains", 130, 0.2, 2.5, 28, [(1, "cup", 160)]),
    ("00009", "Syrup, test", "Sweets", 300, 0, 0, 75, [(1, "fl oz", 39)]),
    ("00010", "Squash soup, BRANDNAME", "Soups", 60, 2, 1, 9, []),
    ("00011", "Squash, winter, test, raw", "Vegetables", 40, 0.1, 1, 10, [(1, "item", 400)]),
)  # fmt: skip
NAMES = (
    ("flour", "00001", ""),
    ("egg", "00002", ""),
    ("garlic", "00003", ""),
    ("broth", "00004", ""),
    ("oil", "00005", ""),
    ("bell pepper", "00006", ""),
    ("rice", "00007", "00008"),
    ("syrup", "00009", ""),
)


def tiny_table() -> FoodTable:
    return FoodTable(
        {row[0]: Food(*row[:-1], portions=tuple(Portion(*p) for p in row[-1])) for row in FOODS}  # type: ignore[arg-type]
    )


def tiny_common() -> dict[str, CommonFood]:
    return {normalise(name): CommonFood(name, raw, served or raw, "", "") for name, raw, served in NAMES}


def write_sr28_csv(folder: Path, rename: dict[str, str] | None = None) -> None:
    """The made-up foods as sr28_foods.csv and sr28_portions.csv; `rename` gives foods other numbers."""
    names = rename or {}
    with (folder / "sr28_foods.csv").open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["ndb_no", "description", "food_group", "kcal", "fat_g", "protein_g", "carb_g"])
        rows.writerows([names.get(row[0], row[0]), *row[1:-1]] for row in FOODS)
    with (folder / "sr28_portions.csv").open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["ndb_no", "seq", "amount", "measure", "grams"])
        for row in FOODS:
            rows.writerows([names.get(row[0], row[0]), i, *p] for i, p in enumerate(row[-1]))


# numbers under which the package's own map knows the made-up foods
REAL_NUMBERS = {
    "00001": "20081",
    "00002": "01123",
    "00003": "11215",
    "00004": "06194",
    "00005": "04053",
    "00006": "11333",
    "00007": "20044",
    "00008": "20045",
    "00009": "19353",
}
