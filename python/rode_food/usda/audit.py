"""Labelled nutrition against USDA's tables over a whole set, by food group."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rode_food.records import FoodRecord, Ingredient
from rode_food.usda.compare import Comparison, Limits, compare, disagreements
from rode_food.usda.estimate import Estimate, Estimator
from rode_food.usda.tables import NUTRIENTS

_NOT_TOLD = "(no trusted food)"


@dataclass
class _Sums:
    """Sums over label and tables, for pMAE and bias of each of `NUTRIENTS`."""

    count: int = 0
    mass: float = 0.0
    label_energy: float = 0.0
    error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NUTRIENTS, 0.0))
    bias: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NUTRIENTS, 0.0))
    usda: dict[str, float] = field(default_factory=lambda: dict.fromkeys(NUTRIENTS, 0.0))

    def add(self, mass: float, label: dict[str, float], usda: dict[str, float]) -> None:
        self.count += 1
        self.mass += mass
        self.label_energy += label["energy"]
        for name in NUTRIENTS:
            self.error[name] += abs(label[name] - usda[name])
            self.bias[name] += label[name] - usda[name]
            self.usda[name] += usda[name]

    def json(self) -> dict[str, Any]:
        def percent(sums: dict[str, float]) -> dict[str, float | None]:
            return {n: 100 * sums[n] / self.usda[n] if self.usda[n] > 0 else None for n in NUTRIENTS}

        return {
            "count": self.count,
            "mass": self.mass,
            "pmae": percent(self.error),
            "bias": percent(self.bias),
        }


class Audit:
    """Collects records one by one; `result()` tells what came out.

    Args:
        estimator: of the tables.
        limits: for the share of dishes that agree.
        automatic: trust foods that were found automatically as well.
        worst: how many names to list whose labels differ most.
    """

    def __init__(
        self, estimator: Estimator, limits: Limits, *, automatic: bool = False, worst: int = 20
    ) -> None:
        self._estimator, self._limits, self._automatic, self._worst = estimator, limits, automatic, worst
        self._groups: defaultdict[str, _Sums] = defaultdict(_Sums)
        self._names: defaultdict[tuple[str, str], _Sums] = defaultdict(_Sums)
        self._dishes = _Sums()
        self._counts: Counter[str] = Counter()
        self._untold: Counter[str] = Counter()
        self._lacking: Counter[str] = Counter()
        self._no_grams: Counter[str] = Counter()
        self._outside: Counter[str] = Counter()

    def add_all(self, records: Iterable[FoodRecord]) -> Audit:
        for record in records:
            self.add(record)
        return self

    def add(self, record: FoodRecord) -> None:
        self._counts["dishes"] += 1
        for ingredient in record.ingredients:
            estimate = self._estimator.estimate(ingredient)
            self._counts["ingredients"] += 1
            how = "none" if estimate.match is None else estimate.match.how
            self._counts[f"ingredients_{how}"] += 1
            if estimate.lacks is not None:
                self._counts["ingredients_lacking"] += 1
                self._lacking[f"{estimate.lacks.name} ({self._estimator.number(estimate.lacks)})"] += 1
            elif how != "map":
                self._untold[ingredient.name.lower()] += 1
            if estimate.grams.grams is not None:
                self._counts["lines_with_grams"] += 1
                if how == "map":
                    self._counts["lines_with_grams_and_food"] += 1
            else:
                self._no_grams[estimate.grams.how] += 1
            self._add_ingredient(ingredient, estimate)
        comparison = compare(record, self._estimator, automatic=self._automatic)
        if comparison is None:
            self._counts["dishes_unlabelled"] += 1
            return
        self._add_dish(comparison)

    def _add_ingredient(self, ingredient: Ingredient, estimate: Estimate) -> None:
        nutrition, mass = ingredient.nutrition, ingredient.mass
        if nutrition is None or mass is None or any(getattr(nutrition, n) is None for n in NUTRIENTS):
            return
        label = {name: float(getattr(nutrition, name)) for name in NUTRIENTS}
        self._counts["ingredients_labelled"] += 1
        food = estimate.food(self._automatic)
        if food is None:
            group = self._groups[_NOT_TOLD]
            group.count += 1
            group.mass += mass
            group.label_energy += label["energy"]
            return
        usda = {name: getattr(food, name) * mass / 100 for name in NUTRIENTS}
        self._groups[food.group].add(mass, label, usda)
        self._names[ingredient.name.lower(), food.description].add(mass, label, usda)

    def _add_dish(self, comparison: Comparison) -> None:
        outside = disagreements(comparison, self._limits)
        if outside is None:
            self._counts["dishes_not_checkable"] += 1
            return
        self._counts["dishes_checked"] += 1
        self._dishes.add(0.0, dict(comparison.label), dict(comparison.usda))
        self._counts["dishes_agreeing"] += not outside
        self._outside.update(outside)

    def result(self) -> dict[str, Any]:
        """JSON-able: `counts`, `groups`, `dishes`, `worst` names by difference in energy, `untold` names, and `lacking`: foods
        chosen by hand that the table does not have.

        pMAE is 100 x sum |label - USDA| / sum USDA, bias the same without the bars; masses in g.
        """
        mass = sum(group.mass for group in self._groups.values())
        energy = sum(group.label_energy for group in self._groups.values())
        groups = {}
        for name, sums in sorted(self._groups.items(), key=lambda item: -item[1].mass):
            row = sums.json()
            row["mass_share"] = sums.mass / mass if mass > 0 else None
            row["energy_share"] = sums.label_energy / energy if energy > 0 else None
            groups[name] = row
        names = sorted(self._names.items(), key=lambda item: (-item[1].error["energy"], item[0]))
        return {
            "counts": dict(sorted(self._counts.items())),
            "groups": groups,
            "dishes": self._dishes.json() | {"outside": dict(self._outside.most_common())},
            "worst": [
                {"name": name, "usda": food, "energy_error": sums.error["energy"], **sums.json()}
                for (name, food), sums in names[: self._worst]
            ],
            "untold": dict(self._untold.most_common(self._worst)),
            "lacking": dict(self._lacking.most_common(self._worst)),
            "no_grams": dict(self._no_grams.most_common(self._worst)),
        }
