"""An ingredient line's food, grams and nutrition by USDA's tables."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass

from rode_food.lines.reading import Line, line_of
from rode_food.records import Ingredient
from rode_food.usda.matching import Match, Matcher, State
from rode_food.usda.measures import Grams, to_grams
from rode_food.usda.names import CommonFood
from rode_food.usda.tables import NUTRIENTS, Food, FoodTable, load_foods

_REMEMBERED = 200_000
"""Lines kept; memory does not grow with the set."""
_CANS = frozenset(("can", "tin", "jar"))


@dataclass(frozen=True)
class Estimate:
    """The tables' estimate for a line.

    Attributes:
        match: the food, or None.
        grams: by the line's own words; see `Grams`.
        lacks: the food that was chosen by hand for the name, where the table does not have it: no fault of line or label.
    """

    match: Match | None
    grams: Grams
    lacks: CommonFood | None = None

    @property
    def trusted(self) -> bool:
        """The food was chosen by hand."""
        return self.match is not None and self.match.how == "map"

    def food(self, automatic: bool) -> Food | None:
        """The food to compare a label with: one chosen by hand, or if `automatic` the nearest description.

        Where the table lacks the food that was chosen by hand, the nearest one is another, and none is given.
        """
        if self.match is None or not (self.trusted or (automatic and self.lacks is None)):
            return None
        return self.match.food


def nutrition_of(food: Food, grams: float) -> dict[str, float]:
    """Energy in kcal, fat, protein and carb in g of so much of a food."""
    return {name: getattr(food, name) * grams / 100 for name in NUTRIENTS}


class Estimator:
    """Lines to estimates; lines that come again cost nothing.

    Args:
        table: the foods.
        state: whether names mean food as a recipe uses it or as it is served; see `Matcher`.
        common: another map of names than the package's.
    """

    def __init__(
        self, table: FoodTable, state: State = "recipe", common: Mapping[str, CommonFood] | None = None
    ) -> None:
        self.matcher = Matcher(table, state, common)
        self._known: dict[tuple[object, ...], Estimate] = {}

    def estimate(self, ingredient: Ingredient) -> Estimate:
        """The estimate for an ingredient of a record; see `lines.line_of`."""
        key = ingredient.text, ingredient.name, ingredient.amount, ingredient.unit
        if key not in self._known:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[key] = self.estimate_line(line_of(ingredient))
        return self._known[key]

    def number(self, food: CommonFood) -> str:
        """The NDB number of a food of the map, in the state that names have here."""
        return food.served if self.matcher.state == "served" else food.ndb_no

    def estimate_line(self, line: Line) -> Estimate:
        """The estimate for a line that was read."""
        canned = any(amount.unit in _CANS for amount in line.amounts)
        match = self.matcher.match(line.names, canned=canned) if line.names else None
        lacks = self.matcher.lacking(line.names, canned=canned) if line.names else None
        grams = to_grams(line, match.food if match else None)
        if lacks is not None and match is None and grams.grams is None:
            grams = Grams(None, "the table lacks the food")
        return Estimate(match, grams, lacks)


@functools.lru_cache(maxsize=4)
def shared_estimator(folder: str | os.PathLike[str], state: State) -> Estimator:
    """One estimator for a folder of tables, made once in each process."""
    return Estimator(load_foods(folder), state)
