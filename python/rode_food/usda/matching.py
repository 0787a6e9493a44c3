"""The match from an ingredient name to a USDA food."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from rode_food.lines.words import singular
from rode_food.usda.names import CommonFood, common_foods, normalise, simpler
from rode_food.usda.tables import Food, FoodTable, UsdaError

State = Literal["recipe", "served"]
"""What names mean: `recipe`, food as it goes into the pot; `served`, as it lies on the plate."""

# not what a recipe's line means, unless it says so
_UNLIKELY_GROUPS = frozenset(
    (
        "Baby Foods",
        "Fast Foods",
        "Restaurant Foods",
        "Meals, Entrees, and Side Dishes",
        "American Indian/Alaska Native Foods",
        "Snacks",
        "Breakfast Cereals",
    )
)
# say nothing about which food it is
_PLAIN_WORDS = (
    "raw fresh unprepared regular whole all type commercial variety dried dry plain and or with without"
)
_PROCESSED_WORDS = (
    "cooked canned frozen fried roasted baked boiled braised stewed broiled prepared smoked pickled dehydrated powder "
    "imitation substitute free reduced low lowfat nonfat light mix babyfood"
)
_PLAIN = frozenset(_PLAIN_WORDS.split())
_PROCESSED = frozenset(_PROCESSED_WORDS.split())
_REMEMBERED = 200_000
"""Names kept; memory does not grow with the set."""
_ENOUGH = 0.7
"""Share of a name, in bits of information, that a description must have."""


@dataclass(frozen=True)
class Match:
    """A food for a name.

    Attributes:
        food: of the table.
        how: "map" for a name that was mapped by hand, "automatic" for the nearest description: wrong in a quarter of
            cases and more (docs/golden.md), so never evidence by itself.
        name: the reading of the name that it was found by.
    """

    food: Food
    how: Literal["map", "automatic"]
    name: str


class Matcher:
    """Names to foods of one table; every answer is kept, so that a name costs something once.

    Args:
        table: the foods.
        state: which of the map's two foods a name means.
        common: the hand-made map, normal form of a name -> food; `common_foods()` unless a test has its own.

    Raises:
        UsdaError: if none of the map's foods is in the table.
    """

    def __init__(
        self, table: FoodTable, state: State = "recipe", common: Mapping[str, CommonFood] | None = None
    ) -> None:
        self.table = table
        self.state = state
        self._common = common_foods() if common is None else common
        if self._common and not any(row.ndb_no in table for row in self._common.values()):
            raise UsdaError(
                f"USDA tables: none of the {len(self._common)} common foods is among these {len(table)} foods; "
                "take SR Legacy (or the full download), which has their NDB numbers"
            )
        self._found: dict[tuple[str, ...], Match | None] = {}
        self._tokens: dict[str, frozenset[str]] = {}
        self._heads: dict[str, frozenset[str]] = {}
        self._index: dict[str, list[str]] = defaultdict(list)
        for food in table:
            self._tokens[food.id] = _tokens(food.description)
            self._heads[food.id] = _tokens(
                re.sub(
                    r"^(?:spices|nuts|seeds|fish|crustaceans|cheese),", "", food.description.lower()
                ).split(",")[0]
            )
            for token in self._tokens[food.id]:
                self._index[token].append(food.id)
        count = len(table)
        self._bits = {token: math.log2((count + 1) / len(ids)) for token, ids in self._index.items()}

    def match(self, names: str | Iterable[str], *, canned: bool = False) -> Match | None:
        """The food that a line's names mean: by the map for any of them, else the nearest description to the first.

        Args:
            names: readings of one line, the likeliest first; as they stand, not normalised.
            canned: the line counts cans: "canned tomatoes" is tried before "tomatoes".
        """
        readings = (names,) if isinstance(names, str) else tuple(names)
        key = (*readings, "canned" if canned else "")
        if key not in self._found:
            if len(self._found) >= _REMEMBERED:
                self._found.clear()
            self._found[key] = self._match([form for name in readings if (form := normalise(name))], canned)
        return self._found[key]

    def lacking(self, names: str | Iterable[str], *, canned: bool = False) -> CommonFood | None:
        """The food that the map has for a line's names, where the map knows them and the table does not have that food.

        Args:
            names, canned: as for `match`.
        """
        found = self.match(names, canned=canned)
        if found is not None and found.how == "map":
            return None
        for name in (names,) if isinstance(names, str) else names:
            for reading in simpler(normalise(name)):
                for form in (f"canned {reading}" if canned else "", reading):
                    row = self._common.get(form)
                    if row is not None and self._of(form, served=self.state == "served") is None:
                        return row
        return None

    def _match(self, names: list[str], canned: bool) -> Match | None:
        for name in names:
            if (match := self._mapped(name, canned)) is not None:
                return match
        for name in names[:1]:
            if (match := self._nearest(name)) is not None:
                return match
        return None

    def _mapped(self, name: str, canned: bool) -> Match | None:
        for reading in simpler(name):
            cooked = re.match(r"(?:cooked|boiled|steamed) (.+)", reading)
            tinned = re.match(r"canned (.+)", reading)
            for form in (f"canned {reading}" if canned else "", reading):
                if (food := self._of(form, served=self.state == "served")) is not None:
                    return Match(food, "map", form)
            if cooked and (food := self._of(cooked[1], served=True)) is not None:
                # where the map has one food for both states, it does not know this one cooked
                known = food is not self._of(cooked[1], served=False)
                return Match(food, "map", cooked[1]) if known else None
            if tinned and (food := self._of(tinned[1], served=False)) is not None:
                return Match(food, "map", tinned[1]) if "canned" in food.description else None
        return None

    def _of(self, form: str, *, served: bool) -> Food | None:
        row = self._common.get(form)
        id = None if row is None else row.served if served else row.ndb_no
        return self.table[id] if id is not None and id in self.table else None

    def _nearest(self, name: str) -> Match | None:
        words = simpler(name)[-1].split() if simpler(name) else []
        query = [word for word in words if word in self._bits]
        # the last word says what it is: "chicken stock" is no chicken
        if not words or words[-1] not in self._bits:
            return None
        head = words[-1]
        total = sum(self._bits[word] for word in query) + sum(
            12.0 for word in words if word not in self._bits
        )
        wanted = frozenset(query)
        best: tuple[float, str] | None = None
        for id in self._index[head]:
            tokens = self._tokens[id]
            recall = sum(self._bits[word] for word in wanted & tokens) / total
            if recall < _ENOUGH:
                continue
            food = self.table[id]
            extra = tokens - wanted
            score = (
                4 * recall
                + (1.0 if self._heads[id] <= wanted else 0.0)
                - 0.08 * len(extra - _PLAIN)
                - 0.5 * len(extra & _PROCESSED)
                - (1.5 if food.group in _UNLIKELY_GROUPS else 0.0)
                - (1.0 if re.search(r"[A-Z]{4}", food.description) else 0.0)  # a brand
                + (0.3 if "raw" in tokens else 0.0)
            )
            if best is None or (score, -int_id(id)) > (best[0], -int_id(best[1])):
                best = score, id
        return None if best is None else Match(self.table[best[1]], "automatic", " ".join(words))


def int_id(id: str) -> int:
    """A food's number, for an order that does not hang on the table's."""
    return int(id.rsplit(":", 1)[-1])


def _tokens(description: str) -> frozenset[str]:
    return frozenset(singular(word) for word in re.findall(r"[a-z]+", description.lower()))
