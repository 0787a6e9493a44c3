"""How far the plates alone explain a difference: `python results/resample.py RUNS A B [--seed N] [--rounds N]`.

RUNS is a folder of run folders (runs/reproduce/BASE), A and B are variants in it. The held-out records are drawn again with
replacement, the same for both; prints IoU and pMAE of each and of A - B: what was found, and the 5 % and 95 % quantiles.
"""

from __future__ import annotations

import argparse
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from rode_food.metrics import read_predictions, score

METRICS = {"ingredient_iou": "IoU", "pmae": "pMAE"}
TASKS = ("ingredients", "nutrition")


def by_record(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Record -> its answers to the two questions."""
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_predictions(folder / "evaluation" / "predictions.jsonl"):
        if row["task"] in TASKS:
            rows[row["id"]].append(row)
    return rows


def values(rows: dict[str, list[dict[str, Any]]], records: list[str]) -> dict[str, float]:
    found = score([row for record in records for row in rows[record]])["all"]
    return {name: found[metric] for metric, name in METRICS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("variants", nargs=2)
    parser.add_argument("--seed", type=int, default=0, help="of the runs (default 0)")
    parser.add_argument("--rounds", type=int, default=200, help="default 200")
    options = parser.parse_args()
    first, second = (by_record(options.runs / f"{name}-seed{options.seed}") for name in options.variants)
    records, rng = sorted(first), random.Random(0)
    if records != sorted(second):
        raise SystemExit("the two were not asked about the same records")
    samples = [records, *(rng.choices(records, k=len(records)) for _ in range(options.rounds))]
    pairs = [(values(first, sample), values(second, sample)) for sample in samples]
    for name in METRICS.values():
        columns = {
            options.variants[0]: [a[name] for a, _ in pairs],
            options.variants[1]: [b[name] for _, b in pairs],
            "difference": [a[name] - b[name] for a, b in pairs],
        }
        for what, (found, *drawn) in columns.items():
            drawn.sort()
            cut = len(drawn) // 20
            print(f"{name:5} {what:15} {found:7.2f} ({drawn[cut]:.2f} to {drawn[-1 - cut]:.2f})")


if __name__ == "__main__":
    main()
