"""How often lines find their food, against lines labelled by hand; `labelled_lines.csv` holds 100 of them.

The labels name recipe, field and line, and not the text: whoever measures brings the recipes.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from rode_food.lines.reading import read_line
from rode_food.usda.estimate import Estimate, Estimator

_COLUMNS = ("file", "recipe", "field", "line", "sha256", "accepted", "grams_min", "grams_max")
CLOSE = 0.2
"""Grams are close if they miss the label's range by at most this share."""


@dataclass(frozen=True)
class Label:
    """One line, labelled by hand.

    Attributes:
        text: the line.
        accepted: ids of all foods that a careful person would take; None among them where no food is right too.
        grams: the range that the line means; None where it states no amount that can be weighed.
    """

    text: str
    accepted: frozenset[str | None]
    grams: tuple[float, float] | None


def read_labels(recipes: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None) -> list[Label]:
    """The labels with their lines.

    Args:
        recipes: folder of the files that the labels name: JSON lists of objects with an `id` and lists of lines.
        labels: CSV with the columns file, recipe, field, line (from 0), sha256 (12 digits of the line's), accepted (NDB
            numbers apart by spaces, `-` for "none"), grams_min and grams_max; None for the package's own.

    Raises:
        ValueError: for labels that cannot be read or whose line is not there or another one; names file and line.
        OSError: for a file that is missing.
    """
    path = (
        Path(str(resources.files("rode_food.usda") / "labelled_lines.csv"))
        if labels is None
        else Path(labels)
    )
    files: dict[str, dict[str, Any]] = {}
    found = []
    with path.open(encoding="utf-8", newline="") as rows:
        reader = csv.DictReader(rows)
        if list(reader.fieldnames or ()) != list(_COLUMNS):
            raise ValueError(f"{path}:1: expected the columns {','.join(_COLUMNS)}")
        for row in reader:
            where = f"{path}:{reader.line_num}"
            if row["file"] not in files:
                files[row["file"]] = _recipes(Path(recipes) / row["file"])
            try:
                text = files[row["file"]][row["recipe"]][row["field"]][int(row["line"])]
                grams = (float(row["grams_min"]), float(row["grams_max"])) if row["grams_min"] else None
            except (KeyError, IndexError, TypeError, ValueError):
                raise ValueError(
                    f"{where}: no such line in {row['file']}, or a number that is none"
                ) from None
            if hashlib.sha256(text.encode()).hexdigest()[:12] != row["sha256"]:
                raise ValueError(f"{where}: the line in {row['file']} is another one than was labelled")
            accepted = frozenset(None if id == "-" else id for id in row["accepted"].split())
            found.append(Label(text, accepted, grams))
    return found


def _recipes(path: Path) -> dict[str, Any]:
    try:
        return {entry["id"]: entry for entry in json.loads(path.read_text(encoding="utf-8"))}
    except (json.JSONDecodeError, TypeError, KeyError):
        raise ValueError(f"{path}: expected a JSON list of objects with an id") from None


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share, in percent; (0, 100) of nothing."""
    if count == 0:
        return 0.0, 100.0
    z = 1.959963984540054
    p = hits / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def _share(hits: int, count: int) -> dict[str, float | int | None]:
    low, high = wilson(hits, count)
    percent = 100 * hits / count if count else None
    return {"hits": hits, "of": count, "percent": percent, "low": low, "high": high}


def measure(labels: Sequence[Label], estimator: Estimator) -> dict[str, Any]:
    """Precision, coverage and grams over labelled lines.

    Returns:
        `precision` of map, automatic and both: right ones of those that found a food. `coverage`: lines that found a
        food by either, of those that have one. `grams`: lines whose grams are close, of those that gave some and whose
        label has some; `grams_coverage`: those, of all whose label has some; `grams_unfounded`: grams given where the
        label says that the line has none. `wrong`: each miss with what was taken.
    """
    estimates = [estimator.estimate_line(read_line(label.text)) for label in labels]
    pairs = list(zip(labels, estimates, strict=True))

    def right(label: Label, estimate: Estimate) -> bool:
        return estimate.match is not None and estimate.match.food.id in label.accepted

    def precision(*kinds: str) -> dict[str, float | int | None]:
        chosen = [pair for pair in pairs if pair[1].match is not None and pair[1].match.how in kinds]
        return _share(sum(right(*pair) for pair in chosen), len(chosen))

    have = [(label, e) for label, e in pairs if any(id is not None for id in label.accepted)]
    weighed = [(label, e) for label, e in pairs if label.grams is not None]
    given = [
        (label.grams, e.grams.grams) for label, e in weighed if label.grams and e.grams.grams is not None
    ]
    close = sum(low * (1 - CLOSE) <= grams <= high * (1 + CLOSE) for (low, high), grams in given)
    unfounded = [e for label, e in pairs if label.grams is None and e.grams.grams is not None]
    return {
        "lines": len(labels),
        "precision": {
            "map": precision("map"),
            "automatic": precision("automatic"),
            "both": precision("map", "automatic"),
        },
        "coverage": {
            "map": _share(sum(e.trusted for _, e in have), len(have)),
            "both": _share(sum(e.match is not None for _, e in have), len(have)),
        },
        "grams": _share(close, len(given)),
        "grams_coverage": _share(len(given), len(weighed)),
        "grams_unfounded": len(unfounded),
        "wrong": [
            {
                "line": label.text,
                "how": e.match.how,
                "took": e.match.food.description,
                "accepted": sorted(id or "-" for id in label.accepted),
            }
            for label, e in pairs
            if e.match is not None and not right(label, e)
        ],
        "grams_off": [
            {"line": label.text, "grams": e.grams.grams, "by": e.grams.how, "label": label.grams}
            for label, e in weighed
            if label.grams
            and e.grams.grams is not None
            and not label.grams[0] * (1 - CLOSE) <= e.grams.grams <= label.grams[1] * (1 + CLOSE)
        ],
    }


def report(result: dict[str, Any]) -> str:
    """`measure`'s result in words."""

    def show(share: dict[str, Any]) -> str:
        if share["percent"] is None:
            return "none"
        return (
            f"{share['hits']} of {share['of']} = {share['percent']:.0f} % "
            f"(95 %: {share['low']:.0f} to {share['high']:.0f})"
        )

    lines = [f"{result['lines']} lines labelled by hand"]
    lines += [f"right, of those matched by {how}: {show(s)}" for how, s in result["precision"].items()]
    lines += [f"matched by {how}, of those with a food: {show(s)}" for how, s in result["coverage"].items()]
    lines.append(f"grams within {100 * CLOSE:.0f} %, of those found: {show(result['grams'])}")
    lines.append(f"grams found, of those that can be weighed: {show(result['grams_coverage'])}")
    lines.append(f"grams given where the line tells none: {result['grams_unfounded']}")
    lines += [f"wrong ({w['how']}): {w['line']} -> {w['took']}" for w in result["wrong"]]
    lines += [
        f"grams off: {w['line']} -> {w['grams']:.1f} g by {w['by']}, label {w['label'][0]:g} to {w['label'][1]:g} g"
        for w in result["grams_off"]
    ]
    return "\n".join(lines)
