from __future__ import annotations

import pytest

from rode_food.plausible import doubts
from rode_food.records import FoodRecord, Ingredient, Nutrition


def record(nutrition: Nutrition | None = None, *ingredients: Ingredient) -> FoodRecord:
    return FoodRecord("a", "/a.jpg", "s", nutrition=nutrition, ingredients=ingredients)


@pytest.mark.parametrize(
    ("one", "found"),
    [
        (record(Nutrition(3000, 2000, 50, 50, 200)), [("a dish of more than 2,500 g", "3,000 g")]),
        (record(Nutrition(2000, 4000, 50, 50, 200)), [("a dish of more than 3,500 kcal", "4,000 kcal")]),
        (
            record(None, Ingredient("flour", 1.6, "kg", 1600)),
            [("more than 1,500 g of one ingredient", "1,600 g of flour")],
        ),
        (
            record(Nutrition(100, 500, 50, 50, 50)),
            [
                (
                    "fat, protein and carbohydrate that weigh more than the whole",
                    "the dish: 150.0 g in 100.0 g",
                )
            ],
        ),
        (
            record(None, Ingredient("oil", mass=10, nutrition=Nutrition(10, 900, 10))),
            [("more energy than fat has", "oil: 900 kcal in 10.0 g")],
        ),
        (record(Nutrition(350, 500, 10, 30, 60), Ingredient("rice", mass=150)), []),
        (record(Nutrition(energy=500)), []),
        (record(), []),
    ],
)
def test_doubts(one, found):
    assert list(doubts(one)) == found
