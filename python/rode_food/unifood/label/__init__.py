"""Nutrition of every ingredient, asked of a vision model behind an OpenAI-compatible endpoint."""

from rode_food.unifood.label.errors import LabelError, Unfinished

__all__ = ["LabelError", "Unfinished"]
