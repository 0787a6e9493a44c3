"""Ingredient recognition: intersection over union of sets of names (InverseCooking)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rode_food.names import ingredient_key, normalise_name
from rode_food.vocabulary import Vocabulary


@dataclass(frozen=True)
class IngredientIoU:
    """Percent.

    Attributes:
        overall: sum TP / (sum TP + FP + FN) over the whole set, the one InverseCooking prints and the primary one here.
        mean: the mean over images of each image's own IoU.
        coverage: share of the true names that the vocabulary knows; None without one, or without a true name.
        left_out: images that count nowhere, for the vocabulary knows none of their true names. Where that is all of them,
            `overall` and `mean` are None.
    """

    overall: float | None
    mean: float | None
    coverage: float | None = None
    left_out: int = 0


def ingredient_iou(
    predicted: Sequence[Iterable[str] | None],
    true: Sequence[Iterable[str]],
    vocabulary: Vocabulary | None = None,
) -> IngredientIoU:
    """Compares sets of normalised names, image by image.

    With a vocabulary, names on both sides are replaced by their canonical ones before they are compared. A true name that it
    lacks is dropped, as InverseCooking does, and so is the same name in that image's answer: being right about it costs
    nothing. Any other predicted name that it lacks counts as wrong; InverseCooking's model cannot give one.

    Args:
        predicted: names for each image; None (an answer that could not be read) counts as no name.
        true: names for each image, in the same order.
        vocabulary: merges names; None compares them as `normalise_name` leaves them.

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
    names_total = known_total = 0
    for names, truth in zip(predicted, true, strict=True):
        if vocabulary is None:
            left, right = _set(names or ()), _set(truth)
        else:
            left, right, unknown = _canonical_sets(names or (), truth, vocabulary)
            names_total += len(right) + unknown
            known_total += len(right)
            if unknown and not right:
                continue
        common, union = len(left & right), len(left | right)
        common_total += common
        union_total += union
        shares.append(common / union if union else 1.0)
    coverage = 100 * known_total / names_total if names_total else None
    if not shares:
        return IngredientIoU(None, None, coverage, len(true))
    overall = common_total / union_total if union_total else 1.0
    return IngredientIoU(100 * overall, 100 * sum(shares) / len(shares), coverage, len(true) - len(shares))


def _set(names: Iterable[str]) -> set[str]:
    return {normalised for name in names if (normalised := normalise_name(name))}


def _canonical_sets(
    names: Iterable[str], truth: Iterable[str], vocabulary: Vocabulary
) -> tuple[set[str], set[str], int]:
    """(predicted, true) canonical names, and how many true names the vocabulary lacks; they stand in neither set."""
    keys = {key for name in truth if (key := ingredient_key(name))}
    unknown = {key for key in keys if vocabulary.normalise(key) is None}
    answered = {key for name in names if (key := ingredient_key(name))} - unknown
    left = {vocabulary.normalise(key) or key for key in answered}
    return left, set(vocabulary.normalise_set(keys)), len(unknown)
