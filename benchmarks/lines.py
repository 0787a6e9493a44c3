"""How well ingredient lines are read: share of lines lost, amounts right, names right and names with junk, by source.

The lines are a folder of CSV files (columns input, name, quantity, unit; fractions are written `1#1$2`). Rows without a name are
not labelled and are not counted, but for one number: how many of them are lost. A tenth of the lines, by a hash of the text, is
kept apart: `--part check` measures on it, and no rule is made by looking at it.

*Lost*: nothing is read. *Amount right*: the number that the label gives first (the middle of a range), or that of all of
"1 lb 2 oz"; none where the label has none. *Name right*: the same words, singular and without accents; of alternatives ("butter or
oil") the first or all of them; "boiling water" is water. *Junk*: a number, a unit or a
container that the label's name does not have.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import write_json
from rode_food.lines.reading import read_lines, to_ingredient
from rode_food.lines.simple import parse_ingredient_line
from rode_food.records import Ingredient
from rode_food.usda.names import normalise

GOALS = {"lost": 0.1, "amount": 98.0, "name": 95.0, "junk": 0.3}
"""Percent, over all lines: at most, at least, at least, at most."""
PARTS = ("tune", "check", "all")
_UNITS = (
    "g|kg|mg|ml|cl|dl|oz|lbs?|cups?|tbsps?|tsps?|tablespoons?|teaspoons?|pounds?|ounces?|grams?|pints?|quarts?|litres?|liters?|"
    "pkgs?|packages?|tins?|cans?|jars?|x|c"
)
_JUNK = re.compile(rf"\d|^(?:{_UNITS})(?:\b|$)|\b(?:g|kg|ml|oz|lbs?|tbsps?|tsps?)\b|^.$", re.I)
_TEMPERATURE = re.compile(r"^(?:boiling|hot|cold|warm|lukewarm|iced)\s+", re.I)
_WORDS = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "four": 4.0,
    "five": 5.0,
    "six": 6.0,
    "eight": 8.0,
}
_PARTS_OF = {
    "lb": 16.0,
    "pound": 16.0,
    "kg": 1000.0,
    "pint": 20.0,
    "cup": 16.0,
}  # times the unit that follows it


@dataclass(frozen=True)
class Label:
    source: str
    text: str
    name: str
    quantity: str
    unit: str


def read_labels(folder: Path) -> list[Label]:
    """All lines, labelled and not; of one that stands twice the first."""
    found: dict[str, Label] = {}
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                label = Label(path.stem, row["input"], row["name"], row["quantity"], row["unit"])
                if label.text not in found or label.name:
                    found[label.text] = label
    return list(found.values())


def kept_apart(text: str) -> bool:
    """True for the tenth on which no rule is tuned."""
    return hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % 10 == 0


def simple(texts: Sequence[str]) -> list[Ingredient | None]:
    return [parse_ingredient_line(text) for text in texts]


def whole(texts: Sequence[str]) -> list[Ingredient | None]:
    return [to_ingredient(line, text) for line, text in zip(read_lines(texts), texts, strict=True)]


READERS: dict[str, Callable[[Sequence[str]], list[Ingredient | None]]] = {"simple": simple, "whole": whole}


def amount_right(label: Label, amount: float | None) -> bool:
    """Whether the number is the label's first, or all of a sum."""
    values = _values(label.quantity)
    if not values:
        return amount is None or (label.quantity == "" and amount == 1 and bool(label.unit))
    if amount is None:
        return False
    wanted = {values[0]}
    if "dozen" in label.quantity or "dozen" in label.unit:
        wanted.add(12 * values[0])
    if len(values) > 1:
        # "1 lb 2 oz", "1 cup plus 2 tbsp"; "cups", where the label's numbers and units do not tell which belong together
        times = next((_PARTS_OF[u] for u in label.unit.lower().split() if u in _PARTS_OF), 0.0)
        wanted |= {values[0] + values[1] / t for t in {times, 16.0, 3.0, 48.0} if t}
        if re.fullmatch(r"\d+x", label.quantity.split()[0]):
            wanted.add(values[1])
        if re.match(r"\s*[\d.]+\s+(?:to|or)\s", label.text):
            wanted.add((values[0] + values[1]) / 2)
    return any(abs(amount - value) < 0.011 * max(value, 0.1) for value in wanted)


def _values(quantity: str) -> list[float]:
    """The numbers of a label, a range at its middle: "1#1$2-2 14" -> [1.75, 14]."""
    values = []
    for word in quantity.lower().replace("–", "-").split():
        ends = [end for part in word.split("-") if (end := _number(part)) is not None]
        if ends:
            values.append(sum(ends) / len(ends))
    return values


def _number(text: str) -> float | None:
    if text in _WORDS:
        return _WORDS[text]
    match = re.fullmatch(r"(\d*\.?\d*)(?:#(\d+)\$(\d+))?x?", text)
    if match is None or not (match[1] or match[2]):
        return None
    return float(match[1] or 0) + (float(match[2]) / float(match[3]) if match[2] else 0.0)


def name_right(label: Label, name: str) -> bool:
    # labels have no punctuation: "smoked paprika pimenton" is "smoked paprika (pimenton)"
    wanted, got = (normalise(_TEMPERATURE.sub("", re.sub(r"[()]", " ", n))) for n in (label.name, name))
    if got == wanted or sorted(got.split()) == sorted(wanted.split()):
        return True
    # "beef or chicken stock": "beef stock"
    if not re.search(r"\bor\b|\band\b|&|/|,", label.name):
        return False
    words = set(wanted.split())
    first = normalise(re.split(r"\bor\b|\band\b|&|/|,", label.name)[0])
    return bool(first) and set(first.split()) <= set(got.split()) <= words


def is_junk(label: Label, name: str) -> bool:
    return any(match[0].lower() not in label.name.lower() for match in _JUNK.finditer(name))


def measure(labels: Sequence[Label], found: Sequence[Ingredient | None]) -> dict[str, float]:
    """Percent of each kind."""
    counts: Counter[str] = Counter()
    for label, ingredient in zip(labels, found, strict=True):
        counts += Counter(verdict(label, ingredient))
    total = max(len(labels), 1)
    return {"lines": float(len(labels)), **{kind: 100 * counts[kind] / total for kind in GOALS}}


def verdict(label: Label, ingredient: Ingredient | None) -> list[str]:
    """Which of `GOALS`' kinds a line counts for."""
    if ingredient is None:
        return ["lost"]
    kinds = [
        ("amount", amount_right(label, ingredient.amount)),
        ("name", name_right(label, ingredient.name)),
        ("junk", is_junk(label, ingredient.name)),
    ]
    return [kind for kind, holds in kinds if holds]


def _errors(labels: Sequence[Label], found: Sequence[Ingredient | None], path: str) -> None:
    with Path(path).open("w", encoding="utf-8") as out:
        for label, got in zip(labels, found, strict=True):
            kinds = verdict(label, got)
            wrong = [k for k in ("lost", "junk") if k in kinds] + [
                k for k in ("amount", "name") if k not in kinds
            ]
            if wrong:
                told = [label.text, label.name, label.quantity, label.unit]
                said = [got.name, f"{got.amount}", f"{got.unit}"] if got else []
                out.write("\t".join([",".join(wrong), *told, "->", *said]) + "\n")


def main(options: argparse.Namespace) -> None:
    folder = Path(options.folder or Path(os.environ.get("RODE_DATA", "data")) / "ingredient_lines")
    labels = read_labels(folder)
    if not labels:
        raise SystemExit(
            f"{folder}: expected CSV files of labelled lines, found none; give --folder or set RODE_DATA"
        )
    labels = [x for x in labels if options.part == "all" or kept_apart(x.text) == (options.part == "check")]
    named = [label for label in labels if label.name]
    bare = [label for label in labels if not label.name]
    table = []
    print(
        f"{'reader':8} {'source':14} {'lines':>6} {'lost %':>7} {'amount %':>9} {'name %':>7} {'junk %':>7}"
    )
    for reader in options.readers:
        start = time.perf_counter()
        found = READERS[reader]([label.text for label in named])
        seconds = time.perf_counter() - start
        for source in [*sorted({label.source for label in named}), "all"]:
            rows = [i for i, label in enumerate(named) if source in (label.source, "all")]
            row = measure([named[i] for i in rows], [found[i] for i in rows])
            table.append({"reader": reader, "source": source, "part": options.part, **row})
            print(
                f"{reader:8} {source:14} {row['lines']:6.0f} {row['lost']:7.2f} {row['amount']:9.2f} "
                f"{row['name']:7.2f} {row['junk']:7.2f}"
            )
        print(f"{reader:8} {len(named) / seconds:,.0f} lines a second")
        if options.unlabelled:
            lost = [
                x.text
                for x, i in zip(bare, READERS[reader]([x.text for x in bare]), strict=True)
                if i is None
            ]
            print(f"{reader:8} of {len(bare):,} lines without a label {len(lost)} are lost: {lost[:5]}")
        if options.errors and reader == options.readers[-1]:
            _errors(named, found, options.errors)
    goals = ", ".join(
        f"{kind} {'<=' if kind in ('lost', 'junk') else '>='} {goal:g}" for kind, goal in GOALS.items()
    )
    print(f"goals: {goals}")
    if options.json:
        write_json(options.json, table)
