"""Nutrition of every ingredient, asked of a vision model behind an OpenAI-compatible endpoint."""
