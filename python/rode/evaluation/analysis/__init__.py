"""Analysis of an adapter's router on held-out records: which experts open, for which task, and how evenly (docs/analysis.md)."""
