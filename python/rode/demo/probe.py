"""A linear probe of the features that the projector reads: how much of the answers is there to be read off.

`python -m rode.demo.probe DIR`, where DIR was made by `rode.demo.photographs`. Ridge regression on a picture's CLS token and
the mean and maximum of its pooled patches; its strength, and the score from which a food is named, are chosen on the
validation records.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rode.demo.photographs import LAYER, POOL, SIZE, place_of
from rode.vlm import FeatureSource, load_vlm
from rode_food import Example
from rode_food.data_mixture import load_examples
from rode_food.metrics import category_accuracy, ingredient_iou, mean_baseline, pmae
from rode_food.records import NUTRITION_FIELDS
from rode_food.source import Source
from rode_food.text_table import text_table

STRENGTHS = tuple(10.0**power for power in range(-1, 6))
THRESHOLDS = tuple(n / 20 for n in range(4, 15))


def describe(examples: Sequence[Example], source: FeatureSource) -> torch.Tensor:
    """(examples, features) float64: CLS, mean and maximum of each picture's states, and 1."""
    rows = []
    for example in examples:
        states = source(example.image).states.double()
        skipped = int(source.crop_cls)
        patches = states[skipped:]
        rows.append(torch.cat([states[:skipped].flatten(), patches.mean(0), patches.amax(0), torch.ones(1)]))
    return torch.stack(rows)


def ridge(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights (features, outputs) that minimise ||xw - y||^2 + strength ||w||^2, without a penalty on the last feature."""
    penalty = torch.full((x.shape[1],), strength, dtype=x.dtype)
    penalty[-1] = 1e-9
    return torch.linalg.solve(x.T @ x + torch.diag(penalty), x.T @ y)


class Split:
    """The examples of one task in a split, described; standardised as the training split is."""

    def __init__(self, file: Path, task: str, split: str, source: FeatureSource, scale: Any = None) -> None:
        self.examples = load_examples([Source(str(file), tasks=[task])], split).examples
        x = describe(self.examples, source)
        self.scale = scale or (x[:, :-1].mean(0), x[:, :-1].std(0) + 1e-6)
        self.x = torch.cat([(x[:, :-1] - self.scale[0]) / self.scale[1], x[:, -1:]], dim=1)
        self.references: list[Any] = [example.reference for example in self.examples]


def splits(file: Path, task: str, source: FeatureSource) -> tuple[Split, Split, Split]:
    """For training, validation and test."""
    train = Split(file, task, "train", source)
    val, test = (Split(file, task, split, source, train.scale) for split in ("val", "test"))
    return train, val, test


def probe_ingredients(file: Path, source: FeatureSource) -> tuple[float | None, float | None]:
    """Global IoU on the validation and the test split, in percent."""
    train, val, test = splits(file, "ingredients", source)
    names = sorted({name for reference in train.references for name in reference})
    y = torch.tensor([[float(n in r) for n in names] for r in train.references], dtype=torch.float64)

    def iou(part: Split, weights: torch.Tensor, threshold: float) -> float | None:
        predicted = []
        for row in part.x @ weights:
            best = int(row.argmax())
            predicted.append([n for i, n in enumerate(names) if i == best or row[i] > threshold])
        return ingredient_iou(predicted, part.references).overall

    tried = {strength: ridge(train.x, y, strength) for strength in STRENGTHS}
    best = max(
        ((s, t) for s in STRENGTHS for t in THRESHOLDS), key=lambda st: iou(val, tried[st[0]], st[1]) or 0
    )
    return iou(val, tried[best[0]], best[1]), iou(test, tried[best[0]], best[1])


Errors = dict[str, float | None]


def probe_nutrition(file: Path, source: FeatureSource) -> tuple[Errors, Errors, Errors]:
    """pMAE of the five: of the probe on the validation and the test split, and there of always the training split's mean."""
    train, val, test = splits(file, "nutrition", source)
    y = torch.tensor([[r[n] for n in NUTRITION_FIELDS] for r in train.references], dtype=torch.float64)

    def predicted(part: Split, strength: float) -> list[dict[str, float]]:
        values = (part.x @ ridge(train.x, y, strength)).clamp(min=0).tolist()
        return [dict(zip(NUTRITION_FIELDS, row, strict=True)) for row in values]

    best = min(STRENGTHS, key=lambda s: pmae(predicted(val, s), val.references).mean or 0)
    found = [pmae(predicted(part, best), part.references) for part in (val, test)]
    found.append(mean_baseline(train.references, test.references))
    first, second, third = ({**one.fields, "mean of the five": one.mean} for one in found)
    return first, second, third


def probe_category(file: Path, source: FeatureSource) -> tuple[float, float]:
    """Accuracy on the validation and the test split, in percent."""
    train, val, test = splits(file, "category", source)
    kinds = sorted(set(train.references))
    y = torch.tensor([[float(kind == r) for kind in kinds] for r in train.references], dtype=torch.float64)

    def accuracy(part: Split, strength: float) -> float:
        best = (part.x @ ridge(train.x, y, strength)).argmax(1).tolist()
        return category_accuracy([kinds[i] for i in best], part.references)

    best = max(STRENGTHS, key=lambda strength: accuracy(val, strength))
    return accuracy(val, best), accuracy(test, best)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rode.demo.probe",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--size", type=int, default=SIZE, help=f"pixels (default {SIZE})")
    parser.add_argument("--pool", type=int, default=POOL, help=f"patches (default {POOL})")
    parser.add_argument("--layer", type=int, default=LAYER, help=f"default {LAYER}")
    args = parser.parse_args(argv)
    model, processor = load_vlm(place_of(args.folder, args.layer, args.size, args.pool) / "model")
    source = FeatureSource(model, processor, args.folder / "features", pool=args.pool)
    weighed = args.folder / "weighed-food.jsonl"
    rows = [["", "validation", "held out", "always the mean"]]
    rows.append(["ingredient IoU", *_shown(*probe_ingredients(weighed, source)), ""])
    val, test, mean = probe_nutrition(weighed, source)
    rows += [[f"pMAE {name}", *_shown(val[name], test[name], mean[name])] for name in val]
    groceries = args.folder / "grocery-store.jsonl"
    rows.append(["category accuracy", *_shown(*probe_category(groceries, source)), ""])
    print(text_table(rows))
    return 0


def _shown(*values: float | None) -> list[str]:
    return ["" if value is None else f"{value:.1f}" for value in values]


if __name__ == "__main__":
    raise SystemExit(main())
