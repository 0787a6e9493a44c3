"""Nouns of kitchens in the singular."""

from __future__ import annotations

_IRREGULAR = {
    "leaves": "leaf",
    "loaves": "loaf",
    "halves": "half",
    "cookies": "cookie",
    "brownies": "brownie",
    "smoothies": "smoothie",
    "calories": "calorie",
    "pies": "pie",
    "cloves": "clove",
    "olives": "olive",
    "chives": "chive",
    "endives": "endive",
    "radishes": "radish",
    "molasses": "molasses",
    "swiss": "swiss",
    "oz": "oz",
}


def singular(word: str) -> str:
    """A lower-case English noun in the singular, well enough that both sides of a comparison agree."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("oes", "ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1]
