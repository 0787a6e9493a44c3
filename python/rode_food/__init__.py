"""Food records, the tasks made from them, and mixtures of sources. Nothing here imports torch."""

from rode_food.data_mixture import DataMixture, load_examples
from rode_food.images import ImageError, check_image
from rode_food.records import (
    NUTRITION_FIELDS,
    SPLITS,
    FoodRecord,
    Ingredient,
    Nutrition,
    Quantity,
    RecordError,
    Turn,
    read_records,
    write_records,
)
from rode_food.source import Source, hash_split
from rode_food.tasks import ALL_TASKS, TASKS, Example, make_examples, parse_answer, question

__all__ = [
    "ALL_TASKS",
    "NUTRITION_FIELDS",
    "SPLITS",
    "TASKS",
    "DataMixture",
    "Example",
    "FoodRecord",
    "ImageError",
    "Ingredient",
    "Nutrition",
    "Quantity",
    "RecordError",
    "Source",
    "Turn",
    "check_image",
    "hash_split",
    "load_examples",
    "make_examples",
    "parse_answer",
    "question",
    "read_records",
    "write_records",
]
