"""Ingredient names in one form, and the map from the commonest of them to USDA foods."""

from __future__ import annotations

import csv
import functools
import io
import re
import unicodedata
from dataclasses import dataclass
from importlib import resources

from rode_food.lines.words import singular

# words that change neither what a food is nor what 100 g of it contain
_NEUTRAL_WORDS = (
    "fresh freshly large medium big small ripe chopped diced sliced minced grated shredded crushed peeled "
    "cubed finely thinly roughly coarsely organic raw boneless softened melted cold hot warm lukewarm seeded deseeded "
    "pitted trimmed cleaned washed rinsed thawed heaping heaped level packed firmly quality good pure virgin sized thick "
    "thin cut julienned beaten plain some more extra few additional optional homemade halved quartered torn "
    "unbleached bleached enriched drinking aged mature chinese italian japanese spanish hungarian hass young old flake"
)
_NEUTRAL_LAST_WORDS = (
    "slice mince piece leaf sprig stalk stick root bulb amount quantity usage serving floret cube wedge strip "
    "clove section segment half chunk ring spear head knob taste garnish needed required drizzle meat"
)
_NEUTRAL = frozenset(_NEUTRAL_WORDS.split())
_NEUTRAL_LAST = frozenset(_NEUTRAL_LAST_WORDS.split())


@functools.lru_cache(maxsize=100_000)
def normalise(name: str) -> str:
    """Lower case, no accents, brackets or punctuation, every word singular: "Jalapeño Peppers (2)" -> "jalapeno pepper"."""
    text = unicodedata.normalize("NFKD", name.lower().replace("’", "'"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = re.sub(r"\([^)]*\)?", " ", text)
    text = re.sub(r"(?<=[a-z])'s?\b", "", text)
    return " ".join(singular(word) for word in re.findall(r"[a-z]+", text))


def simpler(name: str) -> list[str]:
    """A normal form and simpler readings of it, the fullest first: "large ripe tomato slice" -> ..., "tomato"."""
    words = name.split()
    kept = [word for word in words if word not in _NEUTRAL]
    readings = [name, " ".join(kept)]
    while len(kept) > 1 and kept[-1] in _NEUTRAL_LAST:
        kept = kept[:-1]
        readings.append(" ".join(kept))
    if "of" in kept:  # "a little bit of salt", "twigs of thyme"
        readings.append(" ".join(kept[len(kept) - kept[::-1].index("of") :]))
    return list(dict.fromkeys(reading for reading in readings if reading))


@dataclass(frozen=True)
class CommonFood:
    """A row of common_foods.csv.

    Attributes:
        name: as it was written there.
        ndb_no: what a recipe means by it: mostly the raw, dry or unprepared food.
        served: what it is on a plate, where that differs ("rice" is raw in a recipe and boiled on a plate).
        expect: words that USDA's description of both must have; a guard against slips.
        note: why this food, where that is not plain.
    """

    name: str
    ndb_no: str
    served: str
    expect: str
    note: str


@functools.cache
def common_foods() -> dict[str, CommonFood]:
    """Normal form of a name -> food, chosen by hand for the commonest names of recipes and weighed plates."""
    text = (resources.files("rode_food.usda") / "common_foods.csv").read_text(encoding="utf-8")
    rows = [
        CommonFood(r["name"], r["ndb_no"], r["served_ndb_no"] or r["ndb_no"], r["expect"], r["note"])
        for r in csv.DictReader(io.StringIO(text))
    ]
    return {normalise(row.name): row for row in rows}
