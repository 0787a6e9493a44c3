"""Statistics of a file of records: one pass over any number of records.

Counts are kept for each distinct category, ingredient and micronutrient. Quartiles are exact (linear between neighbours, numpy's
default) over values held as float32: nine numbers a record at most, 36 MB for a million.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rode_food.names import ingredient_key
from rode_food.records import NUTRITION_FIELDS, SPLITS, FoodRecord

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
LENGTHS = ("ingredients", "steps", "words", "tokens")
NO_SPLIT = "no split"
CHARACTERS_PER_TOKEN = 4
"""The rule of thumb for English text; a real tokenizer differs by some tens of percent."""
TOP = 30
BINS = 40
"""The most bins of a histogram."""
SHOWN_SHARE = 0.99
"""Histograms reach to this quantile of all values; what lies above is counted, not drawn."""


class Collector:
    """Takes records one by one; `result` may be asked for at any time."""

    def __init__(self) -> None:
        self._splits: Counter[str] = Counter()
        self._sources: Counter[str] = Counter()
        self._pictures: Counter[str] = Counter()
        self._known: Counter[str] = Counter()
        self._categories: dict[str, Counter[str]] = {}
        self._ingredients: Counter[str] = Counter()
        self._mentions: Counter[str] = Counter()
        self._micronutrients: dict[str, Counter[str]] = {}
        self._values: dict[str, dict[str, array[float]]] = {}

    def add(self, record: FoodRecord) -> None:
        split = record.split or NO_SPLIT
        self._splits[split] += 1
        self._sources[record.source] += 1
        self._pictures["all"] += len(record.images)
        self._pictures["records without"] += not record.images
        self._pictures["records with several"] += len(record.images) > 1
        self._known["conversation"] += bool(record.conversation)
        if record.category is not None:
            category = " ".join(record.category.replace("_", " ").split()).lower()
            self._known["category"] += 1
            self._categories.setdefault(category, Counter())[split] += 1
        self._add_ingredients(record, split)
        if record.instructions:
            text = "\n".join(record.instructions)
            self._known["recipe"] += 1
            self._value("steps", split, len(record.instructions))
            self._value("words", split, len(text.split()))
            self._value("tokens", split, math.ceil(len(text) / CHARACTERS_PER_TOKEN))
        if (nutrition := record.nutrition) is not None:
            self._known["nutrition"] += nutrition.complete
            for name in NUTRITION_FIELDS:
                if (value := getattr(nutrition, name)) is not None:
                    self._value(name, split, value)
            self._known["micronutrients"] += bool(nutrition.micronutrients)
            for name, quantity in nutrition.micronutrients.items():
                self._micronutrients.setdefault(name, Counter())[quantity.unit] += 1

    def _add_ingredients(self, record: FoodRecord, split: str) -> None:
        ingredients = record.ingredients
        if not ingredients:
            return
        amounts = [i.amount is not None or i.mass is not None for i in ingredients]
        labelled = [i.nutrition is not None and i.nutrition.complete for i in ingredients]
        self._known["ingredients"] += 1
        self._known["amounts"] += all(amounts)
        self._known["ingredient_nutrition"] += all(labelled)
        self._value("ingredients", split, len(ingredients))
        keys = {key for i in ingredients if (key := ingredient_key(i.name))}
        self._ingredients.update(key.replace("_", " ") for key in keys)
        self._mentions["all"] += len(ingredients)
        self._mentions["amount"] += sum(amounts)
        self._mentions["mass"] += sum(i.mass is not None for i in ingredients)
        self._mentions["nutrition"] += sum(labelled)

    def _value(self, name: str, split: str, value: float) -> None:
        self._values.setdefault(name, {}).setdefault(split, array("f")).append(value)

    def result(self) -> dict[str, Any]:
        """See `collect`."""
        splits = [split for split in (*SPLITS, NO_SPLIT) if split in self._splits]
        known = {name: self._known[name] for name in KNOWN}
        categories = sorted(self._categories.items(), key=lambda item: (-item[1].total(), item[0]))
        counts = [counts.total() for _, counts in categories]
        top = sorted(self._ingredients.items(), key=lambda item: (-item[1], item[0]))[:TOP]
        micronutrients = sorted(self._micronutrients.items(), key=lambda item: (-item[1].total(), item[0]))
        return {
            "version": VERSION,
            "records": self._splits.total(),
            "splits": {split: self._splits[split] for split in splits},
            "sources": dict(sorted(self._sources.items(), key=lambda item: (-item[1], item[0]))),
            "pictures": {
                name: self._pictures[name] for name in ("all", "records without", "records with several")
            },
            "known": known,
            "categories": {
                "distinct": len(categories),
                "effective": _effective(counts),
                "all": [
                    {"name": name, "records": count.total(), **{s: count[s] for s in splits}}
                    for name, count in categories
                ],
            },
            "ingredients": {
                "distinct": len(self._ingredients),
                "mentions": {name: self._mentions[name] for name in ("all", "amount", "mass", "nutrition")},
                "top": [{"name": name, "records": count} for name, count in top],
            },
            "lengths": {name: self._distribution(name, splits, whole=True) for name in LENGTHS},
            "nutrition": {name: self._distribution(name, splits, whole=False) for name in NUTRITION_FIELDS},
            "micronutrients": [
                {
                    "name": name,
                    "records": units.total(),
                    "units": dict(sorted(units.items(), key=lambda item: (-item[1], item[0]))),
                }
                for name, units in micronutrients
            ],
        }

    def _distribution(self, name: str, splits: Sequence[str], *, whole: bool) -> dict[str, Any] | None:
        """Summaries and a histogram of one number by split; None where no record has it."""
        import numpy as np

        values = {s: np.frombuffer(v, np.float32) for s, v in self._values.get(name, {}).items()}
        if not values:
            return None
        everything = np.concatenate(list(values.values()))
        edges = _edges(float(np.quantile(everything, SHOWN_SHARE)), len(everything), whole=whole)
        # float64: else numpy rounds it to the values' float32, and a value just below it counts as above
        last = np.float64(edges[-1])
        present = [split for split in splits if split in values]
        return {
            "summary": {"all": _summary(everything), **{s: _summary(values[s]) for s in present}},
            "histogram": {
                "edges": edges,
                # the last bin of numpy's own takes its right edge in, so values above are cut off first
                "counts": {s: np.histogram(values[s][values[s] < last], edges)[0].tolist() for s in present},
                "above": {s: int((values[s] >= last).sum()) for s in present},
            },
        }


KNOWN = (
    "category",
    "ingredients",
    "amounts",
    "recipe",
    "nutrition",
    "ingredient_nutrition",
    "micronutrients",
    "conversation",
)


def collect(records: Iterable[FoodRecord]) -> dict[str, Any]:
    """The statistics of records, JSON-able; independent of their order.

    Returns:
        `records`; `splits`, `sources`: how many of each. `pictures`: how many there are, and records without and with several.
        `known`: records with a category; with ingredients; with an amount or a
        mass for each of them (`amounts`); with instructions (`recipe`); with all five numbers of the dish (`nutrition`); with all
        five of each ingredient; with micronutrients of the dish; with questions of their own (`conversation`).
        `categories`: `distinct`, `effective` (exponential of the entropy: so many, if all were equally common) and `all`,
        the commonest first, with records by split. `ingredients`: distinct names (lower case, without digits and punctuation),
        how many mentions have an amount or mass, a mass, all five numbers; `top`: the names that stand in the most records.
        `lengths` (of records that have the thing; tokens are characters / 4) and `nutrition` (g, kcal, g, g, g): by name None, or
        `summary` for all and each split (n, mean, min, q1, median, q3, max) and `histogram` (bins closed on the left).
        `micronutrients`: records of each, by unit.
    """
    collector = Collector()
    for record in records:
        collector.add(record)
    return collector.result()


def _effective(counts: Sequence[int]) -> float:
    total = sum(counts)
    return _rounded(math.exp(-sum(c / total * math.log(c / total) for c in counts))) if total else 0.0


def _rounded(value: float) -> float:
    """Six digits: what float32 can tell."""
    return float(f"{value:.6g}")


def _summary(values: np.ndarray) -> dict[str, float]:
    import numpy as np

    quartiles = np.quantile(values.astype(np.float64), (0, 0.25, 0.5, 0.75, 1))
    low, q1, median, q3, high = (_rounded(float(q)) for q in quartiles)
    # sorted, for a sum depends on its order and the statistics must not
    mean = _rounded(float(np.sort(values).astype(np.float64).mean()))
    return {"n": len(values), "mean": mean, "min": low, "q1": q1, "median": median, "q3": q3, "max": high}


def _edges(reach: float, n: int, *, whole: bool) -> list[float]:
    """Round edges from 0 to just above `reach`, of at most 2 n^(1/3) bins (Rice's rule) between 10 and `BINS`.

    Whole numbers up to `BINS` have a bin each; edges of whole numbers lie between them, from -0.5 on.
    """
    bins = BINS if whole and reach <= BINS else min(BINS, max(10, round(2 * n ** (1 / 3))))
    power = 10.0 ** math.floor(math.log10(reach / bins)) if reach > 0 else 1.0
    power = max(power, 1.0) if whole else power
    width = next(power * factor for factor in (1, 2, 5, 10) if reach <= bins * power * factor * (1 + 1e-9))
    first = -0.5 if whole else 0.0
    return [_rounded(first + i * width) for i in range(math.floor((reach - first) / width + 1e-9) + 2)]
