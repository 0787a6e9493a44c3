"""Nutrition estimation: mean absolute error as a percentage of the mean truth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rode_food.records import NUTRITION_FIELDS

Values = Mapping[str, float | None]
Truth = Mapping[str, float | None]

LARGEST = 100_000
"""Grams, or kilocalories: no plate has more. A larger number in an answer means nothing, and counts as not given."""


@dataclass(frozen=True)
class PMAE:
    """Percent throughout; None where it is undefined (no truth is known, every truth is 0, or no answer was parsed).

    Attributes:
        fields: pMAE of each of `NUTRITION_FIELDS`.
        mean: the plain mean of the five.
        parse_rate: share of the answers that gave all five numbers.
        parsed_fields, parsed_mean: the same over those answers alone. They flatter a model that
            answers only where it is easy: read them beside `parse_rate`.
    """

    fields: dict[str, float | None]
    mean: float | None
    parse_rate: float
    parsed_fields: dict[str, float | None]
    parsed_mean: float | None


def pmae(predicted: Sequence[Values | None], true: Sequence[Truth]) -> PMAE:
    """100 * mean(abs(pred - true)) / mean(true) for each field.

    A number that the answer does not give, or an answer that could not be read at all, counts as a
    prediction of 0, that is as an error of the whole truth, so that silence cannot win. So does a number that
    is negative, not finite, or above `LARGEST`.

    Args:
        predicted: `parse_answer("nutrition", ...)` of each answer: g and kcal, None where not found.
        true: the numbers of each dish; a field that is missing or None is unknown, and the dish does not count for it.

    Raises:
        ValueError: if the lengths differ or are 0, or a true number is negative or not finite.
    """
    if len(predicted) != len(true) or not true:
        raise ValueError(
            f"predicted and true: expected equal lengths > 0, got {len(predicted)} and {len(true)}"
        )
    for number, values in enumerate(true, start=1):
        for name in NUTRITION_FIELDS:
            known = values.get(name)
            if known is not None and not (math.isfinite(known) and known >= 0):
                raise ValueError(
                    f"true: dish {number}: {name}: expected a number of at least 0, or null, got {known}"
                )
    answers: list[Values] = [_given(answer or {}) for answer in predicted]
    pairs = list(zip(answers, true, strict=True))
    parsed = [pair for pair in pairs if all(pair[0].get(name) is not None for name in NUTRITION_FIELDS)]
    fields, parsed_fields = _fields(pairs), _fields(parsed)
    return PMAE(fields, _mean(fields), 100 * len(parsed) / len(pairs), parsed_fields, _mean(parsed_fields))


def _fields(pairs: Sequence[tuple[Values, Truth]]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name in NUTRITION_FIELDS:
        known = [
            (answer.get(name) or 0.0, value)
            for answer, true in pairs
            if (value := true.get(name)) is not None
        ]
        truth = sum(value for _, value in known)
        error = sum(abs(given - value) for given, value in known)
        out[name] = 100 * error / truth if truth else None
    return out


def _given(answer: Values) -> Values:
    return {name: value for name, value in answer.items() if value is not None and 0 <= value <= LARGEST}


def _mean(fields: Mapping[str, float | None]) -> float | None:
    values = [value for value in fields.values() if value is not None]
    return sum(values) / len(values) if len(values) == len(fields) else None


def mean_baseline(train: Sequence[Truth], test: Sequence[Truth]) -> PMAE:
    """The score on `test` of always answering the training split's mean: the number a model has to beat.

    Raises:
        ValueError: if either is empty.
    """
    if not train:
        raise ValueError("train: expected at least one dish, got none")
    mean = {}
    for name in NUTRITION_FIELDS:
        known = [value for values in train if (value := values.get(name)) is not None]
        mean[name] = sum(known) / len(known) if known else None
    return pmae([mean] * len(test), test)
