"""Food records, the tasks made from them, and mixtures of sources."""

from rode.data.records import (
    NUTRITION_FIELDS,
    SPLITS,
    FoodRecord,
    Ingredient,
    Nutrition,
    Quantity,
    RecordError,
    read_records,
    write_records,
)
from rode.data.tasks import TASKS, Example, make_examples, parse_answer, question

__all__ = [
    "NUTRITION_FIELDS",
    "SPLITS",
    "TASKS",
    "Example",
    "FoodRecord",
    "Ingredient",
    "Nutrition",
    "Quantity",
    "RecordError",
    "make_examples",
    "parse_answer",
    "question",
    "read_records",
    "write_records",
]
