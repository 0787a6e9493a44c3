"""One ingredient out of several lines that name it: 100 g of sugar for the dough and 50 g for the cream are 150 g."""

from __future__ import annotations

from collections.abc import Iterable

from rode_food.lines.units import GRAMS, MILLILITRES
from rode_food.records import Ingredient


def added_up(ingredients: Iterable[Ingredient]) -> tuple[Ingredient, ...]:
    """Ingredients of one name as one, in the order of the first.

    Amounts of one unit, or of units of one kind (weights, volumes), are added, in the first's unit; a line without an amount
    adds none. `text` is then a line that states the sum. Amounts that cannot be added ("1 cup" and "2 sprigs") stay apart.
    """
    found: list[Ingredient] = []
    for ingredient in ingredients:
        for i, earlier in enumerate(found):
            both = _sum(earlier, ingredient) if earlier.name == ingredient.name else None
            if both is not None:
                found[i] = both
                break
        else:
            found.append(ingredient)
    return tuple(found)


def _sum(a: Ingredient, b: Ingredient) -> Ingredient | None:
    if b.amount is None:
        return a
    if a.amount is None:
        return b
    factor = _factor(b.unit, a.unit)
    if factor is None:
        return None
    amount = a.amount + factor * b.amount
    mass = None if a.mass is None or b.mass is None else a.mass + b.mass
    weight = f"({mass:g} g)" if mass is not None and a.unit not in GRAMS else None
    text = " ".join(filter(None, (f"{amount:g}", a.unit, weight, a.name)))
    return Ingredient(a.name, amount, a.unit, mass, text=text)


def _factor(unit: str | None, into: str | None) -> float | None:
    if unit == into:
        return 1.0
    for table in (GRAMS, MILLILITRES):
        if unit in table and into in table:
            return table[unit] / table[into]
    return None
