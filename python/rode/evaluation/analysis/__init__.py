"""What an adapter's router does on held-out records: which experts open, for which task, and how evenly (docs/analysis.md)."""
