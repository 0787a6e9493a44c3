"""An engine for tests of a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Serial:
    """An engine in this process; `fail_at` raises instead of the so-manieth part."""

    fail_at: int | None = None
    parts: list[int] = field(default_factory=list)

    def map(self, function: Callable[[list[str]], list[str]], parts: Any) -> Any:
        for key, lines in parts:
            if self.fail_at == len(self.parts):
                raise KeyboardInterrupt
            self.parts.append(len(lines))
            yield key, function(lines)
