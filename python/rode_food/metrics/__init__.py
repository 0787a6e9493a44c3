"""Metrics of the four food tasks, in percent as in the paper's tables. Nothing here imports torch."""

from rode_food.metrics.ingredients import IngredientIoU, ingredient_iou
from rode_food.metrics.nutrition import PMAE, mean_baseline, pmae
from rode_food.metrics.score import category_accuracy, read_predictions, score
from rode_food.metrics.text import rouge_l, sacrebleu
from rode_food.names import normalise_name

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
