"""What the golden stage can be told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class GoldenSettings:
    tolerance: float = 0.3
    """Relative difference from the USDA's numbers up to which a dish's label counts as agreeing."""
