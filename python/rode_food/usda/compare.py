"""A labelled dish beside what USDA's tables make of its ingredients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rode_food.records import FoodRecord, Ingredient
from rode_food.usda.estimate import Estimate, Estimator, nutrition_of
from rode_food.usda.tables import NUTRIENTS


@dataclass(frozen=True)
class Part:
    """One ingredient of a dish.

    Attributes:
        ingredient: as the record has it.
        estimate: what the tables say of its line.
        grams: its mass: the label's where it has one, else the line's; None if neither is known.
        usda: energy (kcal), fat, protein, carb (g) of that mass by the tables; None without a food that is trusted.
    """

    ingredient: Ingredient
    estimate: Estimate
    grams: float | None
    usda: Mapping[str, float] | None


@dataclass(frozen=True)
class Comparison:
    """A dish by its label and by the tables.

    Two questions, kept apart. Is a gram of each ingredient what the label says? `label` against `usda`, both at the
    label's masses. Are there as many grams as the recipe's lines say? `label_mass` against `line_mass`, over the
    ingredients that have both.

    Attributes:
        parts: its ingredients.
        label: energy (kcal), fat, protein, carb (g) of the dish.
        usda: the same by the tables. Ingredients without a trusted food count as labelled, or, where they have no label
            of their own, like the mean of the others.
        mass_coverage, energy_coverage: share of the dish's mass and energy that the tables tell (0 to 1). Of records
            without labelled ingredients, the smaller of the shares of mass and of lines.
        label_mass, line_mass: grams over the ingredients with a labelled mass and a line that tells one.
        weighed: share of the labelled mass that those are.
    """

    parts: tuple[Part, ...]
    label: Mapping[str, float]
    usda: Mapping[str, float]
    mass_coverage: float
    energy_coverage: float
    label_mass: float
    line_mass: float
    weighed: float


def compare(record: FoodRecord, estimator: Estimator, *, automatic: bool = False) -> Comparison | None:
    """The comparison, or None for a record whose dish lacks energy, fat, protein or carb.

    Args:
        record: a dish.
        estimator: see `Estimator`.
        automatic: trust foods that were found automatically as well.
    """
    nutrition = record.nutrition
    if nutrition is None or any(getattr(nutrition, name) is None for name in NUTRIENTS):
        return None
    label = {name: float(getattr(nutrition, name)) for name in NUTRIENTS}
    parts = tuple(_part(ingredient, estimator, automatic) for ingredient in record.ingredients)
    told = [part for part in parts if part.usda is not None]
    rest = [part for part in parts if part.usda is None]
    told_mass = sum(part.grams or 0.0 for part in told)
    usda = {name: sum(part.usda[name] for part in told if part.usda) for name in NUTRIENTS}
    masses = [part.ingredient.mass for part in parts if part.ingredient.mass is not None]
    known = told_mass + sum(part.grams or 0.0 for part in rest)
    # a dish may weigh more than its labelled ingredients; what is not listed is not told
    mass = max(known, nutrition.mass or 0.0) if masses else known
    mass_coverage = told_mass / mass if mass > 0 else 0.0
    by_mass = all(part.ingredient.mass is not None or part.grams == 0 for part in told)
    if by_mass and masses and all(_labelled(part.ingredient) for part in rest):
        unknown = {name: sum(_value(part.ingredient, name) for part in rest) for name in NUTRIENTS}
        usda = {name: usda[name] + unknown[name] for name in NUTRIENTS}
        energy_coverage = 1 - unknown["energy"] / label["energy"] if label["energy"] > 0 else 1.0
    else:
        # a recipe's lines may be those of four servings: the label's mass says how much of them was served
        scale = (nutrition.mass or known) / told_mass if told_mass > 0 else 0.0
        usda = {name: usda[name] * scale for name in NUTRIENTS}
        mass_coverage = min(mass_coverage, len(told) / len(parts)) if parts else 0.0
        energy_coverage = mass_coverage
    both = [p for p in parts if p.ingredient.mass is not None and p.estimate.grams.grams is not None]
    label_mass = sum(p.ingredient.mass or 0.0 for p in both)
    return Comparison(
        parts=parts,
        label=label,
        usda=usda,
        mass_coverage=mass_coverage,
        energy_coverage=min(1.0, max(0.0, energy_coverage)),
        label_mass=label_mass,
        line_mass=sum(p.estimate.grams.grams or 0.0 for p in both),
        weighed=label_mass / sum(masses) if sum(masses) > 0 else 0.0,
    )


def _part(ingredient: Ingredient, estimator: Estimator, automatic: bool) -> Part:
    estimate = estimator.estimate(ingredient)
    grams = ingredient.mass if ingredient.mass is not None else estimate.grams.grams
    food = estimate.food(automatic)
    if food is not None and grams is None and not any(getattr(food, name) for name in NUTRIENTS):
        grams = 0.0  # salt or water "to taste": however much it is, it adds nothing
    usda = None if food is None or grams is None else nutrition_of(food, grams)
    return Part(ingredient, estimate, grams, usda)


def _labelled(ingredient: Ingredient) -> bool:
    nutrition = ingredient.nutrition
    return nutrition is not None and all(getattr(nutrition, name) is not None for name in NUTRIENTS)


def _value(ingredient: Ingredient, name: str) -> float:
    return float(getattr(ingredient.nutrition, name))


@dataclass(frozen=True)
class Limits:
    """How far a label may be from the tables.

    Attributes:
        tolerance: share of the tables' energy, fat, protein and carb.
        energy_floor: kcal; a smaller difference in energy is none, whatever its share.
        macro_floor: g; likewise for fat, protein and carb.
        coverage: share of mass and energy that the tables must tell, else a dish cannot be checked.
        mass_tolerance: share of the lines' grams by which labelled grams may differ; None: not looked at.
    """

    tolerance: float
    energy_floor: float
    macro_floor: float
    coverage: float
    mass_tolerance: float | None


def disagreements(comparison: Comparison, limits: Limits) -> list[str] | None:
    """The ones of energy, fat, protein, carb and mass that are outside the limits; None for a dish that cannot be checked.

    Mass counts only where lines tell `coverage` of it: a recipe that says "salt to taste" is no evidence.
    """
    if min(comparison.mass_coverage, comparison.energy_coverage) < limits.coverage:
        return None
    outside = []
    for name in NUTRIENTS:
        floor = limits.energy_floor if name == "energy" else limits.macro_floor
        allowed = max(limits.tolerance * comparison.usda[name], floor)
        if abs(comparison.label[name] - comparison.usda[name]) > allowed:
            outside.append(name)
    if limits.mass_tolerance is not None and comparison.weighed >= limits.coverage:
        off = abs(comparison.label_mass - comparison.line_mass)
        if off > limits.mass_tolerance * comparison.line_mass:
            outside.append("mass")
    return outside
