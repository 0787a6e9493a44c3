"""Ingredient recognition: intersection over union of sets of names (InverseCooking)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class IngredientIoU:
    """Percent. `overall`: sum TP / (sum TP + FP + FN) over the whole set, the one InverseCooking prints and
    the primary one here. `mean`: the mean over images of each image's own IoU."""

    overall: float
    mean: float


def normalise_name(name: str) -> str:
    """Lower case; digits and punctuation stripped (a hyphen parts words); one space between words.

    Plurals and synonyms are not merged: "egg" and "eggs" differ.
    """
    name = unicodedata.normalize("NFKC", name).casefold()
    name = re.sub(r"['’`]", "", name)  # "baker's" is one word
    return " ".join(re.sub(r"[\W\d_]+", " ", name).split())


def ingredient_iou(predicted: Sequence[Iterable[str] | None], true: Sequence[Iterable[str]]) -> IngredientIoU:
    """Compares sets of normalised names, image by image.

    Args:
        predicted: names for each image; None (an answer that could not be read) counts as no name.
        true: names for each image, in the same order.

    An image with no name on either side agrees: its IoU is 100, and so is `overall` if all are so.

    Raises:
        ValueError: if the lengths differ or are 0.
    """
    if len(predicted) != len(true) or not true:
        raise ValueError(
            f"predicted and true: expected equal lengths > 0, got {len(predicted)} and {len(true)}"
        )
    shares = []
    common_total = union_total = 0
    for names, truth in zip(predicted, true, strict=True):
        left, right = _set(names or ()), _set(truth)
        common, union = len(left & right), len(left | right)
        common_total += common
        union_total += union
        shares.append(common / union if union else 1.0)
    overall = common_total / union_total if union_total else 1.0
    return IngredientIoU(100 * overall, 100 * sum(shares) / len(shares))


def _set(names: Iterable[str]) -> set[str]:
    return {normalised for name in names if (normalised := normalise_name(name))}
