"""Types of options that several commands share."""

from __future__ import annotations


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "number of at least 1"  # what argparse calls it in its message
