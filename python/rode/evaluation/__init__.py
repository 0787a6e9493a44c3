"""Answers on held-out records, and what a router does there."""

PARTIAL = "predictions.partial.jsonl"
"""Name of the file of answers so far, beside where `predictions.jsonl` will be."""
