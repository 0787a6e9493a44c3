"""Metrics as sums over answers, so that answers can be drawn again (a bootstrap) without being scored again.

Each metric of `rode_food.metrics.score` is a function of sums: global IoU is names in common over names in either, pMAE is
error over truth, and SacreBLEU a function of counted n-grams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rode_food.metrics.ingredients import ingredient_iou
from rode_food.metrics.score import Row, category_accuracy, exact_answers
from rode_food.metrics.text import bleu_counts, bleu_of_counts, rouge_l
from rode_food.metrics.tokens import ROUGE_SCORE, Tokenizer
from rode_food.names import normalise_name
from rode_food.records import NUTRITION_FIELDS
from rode_food.tasks import parse_answer

Sums = dict[str, tuple[float, ...]]
"""Metric -> what one answer adds to its sums."""

_ENGLISH = Tokenizer("13a", ROUGE_SCORE)
"""One answer alone does not tell a data set's language."""
PMAE = tuple(f"pmae_{name}" for name in NUTRITION_FIELDS)


def sums_of(row: Row) -> Sums:
    """What one row of predictions.jsonl, in English, adds to the sums of its task's metrics.

    Raises:
        ImportError: for recipes and questions, if `rode[metrics]` is not installed.
    """
    task, answer, reference = row["task"], row["answer"], row["reference"]
    if task == "ingredients":
        predicted = {normalise_name(name) for name in parse_answer("ingredients", answer) or ()} - {""}
        true = {normalise_name(name) for name in reference} - {""}
        return {
            "ingredient_iou": (len(predicted & true), len(predicted | true)),
            "ingredient_iou_mean": ((ingredient_iou([predicted], [true]).mean or 0.0) / 100, 1.0),
        }
    if task == "nutrition":
        values = parse_answer("nutrition", answer) or {}
        errors = (
            (abs((values.get(name) or 0.0) - reference[name]), reference[name]) for name in NUTRITION_FIELDS
        )
        parsed = all(values.get(name) is not None for name in NUTRITION_FIELDS)
        return {**dict(zip(PMAE, errors, strict=True)), "parse_rate": (float(parsed), 1.0)}
    if task == "recipe":
        truth = row["truth"]
        return {
            "rouge_l": (rouge_l([answer], [truth], _ENGLISH) / 100, 1.0),
            "sacrebleu": bleu_counts(answer, truth),
        }
    if task == "question":
        exact, rouge = exact_answers([answer], [reference]), rouge_l([answer], [reference], _ENGLISH)
        return {"question_exact": (exact / 100, 1.0), "question_rouge_l": (rouge / 100, 1.0)}
    hit = category_accuracy([parse_answer("category", answer)], [reference]) / 100
    return {"category_accuracy": (hit, 1.0)}


def metric_of(name: str, sums: Mapping[str, Sequence[float]]) -> float | None:
    """A metric in percent from the sums over answers; None if it is undefined. "pmae" is the mean of the five.

    Args:
        name: of the metric.
        sums: metric -> sums of `sums_of`.

    Raises:
        KeyError: the sums lack the metric.
    """
    if name == "pmae":
        values = [metric_of(part, sums) for part in PMAE]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None
    if name == "sacrebleu":
        return bleu_of_counts(sums[name])
    above, below = sums[name]
    return 100 * above / below if below else None
