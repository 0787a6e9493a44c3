"""What the operation costs, against plain PyTorch: `python -m benchmarks`. A result is checked before anything is counted."""
