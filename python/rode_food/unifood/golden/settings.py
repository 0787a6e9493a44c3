"""Settings of the golden stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rode_food.usda.compare import Limits


@dataclass
class GoldenSettings:
    """Choice of the labels that agree with the USDA's tables ([golden.md](golden.md)), and how many stay."""

    usda: str | None = None
    """Folder of USDA's tables (`rode_food.usda.load_foods` says which); the stage cannot run without it."""
    splits: list[str] = field(default_factory=lambda: ["test"])
    """Splits to check; others pass through as they are."""
    state: Literal["recipe", "served"] = "recipe"
    """What names mean: food as a recipe uses it ("rice" is raw), or as it lies on the plate (boiled)."""
    tolerance: float = 0.3
    """Relative difference from the USDA's numbers up to which a dish's label counts as agreeing."""
    energy_floor: float = 30.0
    """kcal; a smaller difference in a dish's energy counts as none."""
    macro_floor: float = 3.0
    """g; likewise for fat, protein and carbohydrate."""
    coverage: float = 0.8
    """Share of a dish's mass and energy that foods chosen by hand must tell, else it cannot be checked."""
    uncheckable: Literal["drop", "keep"] = "drop"
    """What becomes of a sample that cannot be checked."""
    mass_tolerance: float | None = 0.5
    """Relative difference of labelled grams from those of the recipe's lines; null: not looked at."""
    max_per_category: int | None = None
    """Samples of one category that stay, by a hash of their ids; `other` and none are no categories."""
    max_category_share: float | None = 0.1
    """The same as a share of the samples that agree; the smaller of the two counts, null: no cap."""

    @property
    def limits(self) -> Limits:
        return Limits(
            tolerance=self.tolerance,
            energy_floor=self.energy_floor,
            macro_floor=self.macro_floor,
            coverage=self.coverage,
            mass_tolerance=self.mass_tolerance,
        )
