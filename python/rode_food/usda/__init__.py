"""USDA's food tables: nutrients per 100 g, household measures, and which food an ingredient line means."""

from rode_food.usda.estimate import Estimate, Estimator
from rode_food.usda.matching import Match, Matcher
from rode_food.usda.tables import Food, FoodTable, Portion, UsdaError, load_foods

__all__ = [
    "Estimate",
    "Estimator",
    "Food",
    "FoodTable",
    "Match",
    "Matcher",
    "Portion",
    "UsdaError",
    "load_foods",
]
