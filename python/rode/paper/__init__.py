"""`rode reproduce`: the paper's tables and figures from runs of our own, beside the paper's numbers."""
