"""Doubts about a record's numbers, for a person to look at: nothing is left out for them."""

from __future__ import annotations

from collections.abc import Iterator

from rode_food.records import FoodRecord, Nutrition

MOST_MASS = 2500.0
"""Grams of a dish; more is a pot, or a whole recipe, not a plate."""
MOST_ENERGY = 3500.0
"""kcal of a dish."""
MOST_OF_ONE = 1500.0
"""Grams of one ingredient."""
DENSEST = 9.2
"""kcal in a gram: pure fat has 9."""


def doubts(record: FoodRecord) -> Iterator[tuple[str, str]]:
    """(reason, what was met) for each."""
    if record.nutrition is not None:
        yield from _of_numbers(record.nutrition, "the dish", MOST_MASS)
        if record.nutrition.energy is not None and record.nutrition.energy > MOST_ENERGY:
            yield f"a dish of more than {MOST_ENERGY:,.0f} kcal", f"{record.nutrition.energy:,.0f} kcal"
    for ingredient in record.ingredients:
        if ingredient.mass is not None and ingredient.mass > MOST_OF_ONE:
            told = f"{ingredient.mass:,.0f} g of {ingredient.name}"
            yield f"more than {MOST_OF_ONE:,.0f} g of one ingredient", told
        if ingredient.nutrition is not None:
            yield from _of_numbers(ingredient.nutrition, ingredient.name, None)


def _of_numbers(nutrition: Nutrition, what: str, most: float | None) -> Iterator[tuple[str, str]]:
    mass = nutrition.mass
    if mass is None:
        return
    if most is not None and mass > most:
        yield f"a dish of more than {most:,.0f} g", f"{mass:,.0f} g"
    parts = sum(value or 0.0 for value in (nutrition.fat, nutrition.protein, nutrition.carb))
    if parts > 1.02 * mass + 1:
        told = f"{what}: {parts:,.1f} g in {mass:,.1f} g"
        yield "fat, protein and carbohydrate that weigh more than the whole", told
    if nutrition.energy is not None and nutrition.energy > DENSEST * mass + 5:
        yield "more energy than fat has", f"{what}: {nutrition.energy:,.0f} kcal in {mass:,.1f} g"
