"""A failed read is tried once more: a network's folder may miss a beat."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PAUSE = 0.5
"""Seconds before the second try."""


def retried(read: Callable[[], T]) -> T:
    """Read, with a second try after `PAUSE` where the first one fails with OSError.

    Raises:
        OSError: of the second try.
    """
    try:
        return read()
    except OSError:
        time.sleep(PAUSE)
        return read()
