"""Metrics of the four food tasks, in percent as in the paper's tables. Nothing here imports torch."""

from rode.data.names import normalise_name
from rode.metrics.ingredients import IngredientIoU, ingredient_iou
from rode.metrics.nutrition import PMAE, mean_baseline, pmae
from rode.metrics.score import category_accuracy, read_predictions, score
from rode.metrics.text import rouge_l, sacrebleu

__all__ = [
    "PMAE",
    "IngredientIoU",
    "category_accuracy",
    "ingredient_iou",
    "mean_baseline",
    "normalise_name",
    "pmae",
    "read_predictions",
    "rouge_l",
    "sacrebleu",
    "score",
]
