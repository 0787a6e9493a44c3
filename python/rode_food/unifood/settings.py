"""Settings of a build: one YAML file, checked key by key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rode_food.readers import READERS
from rode_food.settings import SettingsError, did_you_mean
from rode_food.source import hash_split
from rode_food.unifood.golden.settings import GoldenSettings
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.near import MOST_BITS


@dataclass
class SourceSettings:
    """One source in its publisher's layout."""

    kind: str
    """Its layout: one of the kinds of [sources.md](sources.md)."""
    path: str
    """Its folder (a file for kind `records`)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of its reader: `images_per_recipe: 3`, say."""


@dataclass
class SelectSettings:
    """Choice of the records that are taken."""

    size: int = 100_000
    """Records of all splits together; fewer where the sources have fewer."""
    near_duplicate_bits: int = 4
    """Pictures whose 64-bit perceptual hashes differ in at most so many bits are one picture."""
    on_bad_image: Literal["skip", "error"] = "skip"
    """A picture that is missing or cannot be decoded: leave its record out and name it, or stop."""
    min_ingredients: int = 2
    """Ingredients that a record must have."""
    max_ingredients: int = 19
    """Ingredients that it may have."""
    split_fractions: dict[str, float] = field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    """For sources without splits: a hash of the id decides."""
    seed: int = 0
    """Another one draws another sample."""


@dataclass
class CategorySettings:
    """For records whose source states no category; found in the titles of the training split."""

    size: int = 300
    """Categories to find at most; a title that fits none gives its record no category."""
    min_count: int = 10
    """Titles that a category must have."""


@dataclass
class AggregateSettings:
    """How ingredients are summed up to a dish."""

    micronutrient_coverage: float = 0.9
    """A micronutrient's sum is kept where the ingredients that state it have this share of the dish's mass."""
    min_mass: float = 10.0
    """Grams of a dish; below, or above `max_mass`, its label is no plate or recipe of food."""
    max_mass: float = 20_000.0
    """Grams of a dish, see `min_mass`."""


@dataclass
class ShardSettings:
    """How records and pictures are packed."""

    format: Literal["webdataset", "parquet"] = "webdataset"
    """Tar files or Parquet files."""
    size: int = 1000
    """Records of a shard."""
    on_bad_image: Literal["skip", "error"] = "error"
    """A picture that went or was spoiled since it was selected: stop, or leave its record out and say so."""


@dataclass
class VocabularySettings:
    """Choice of the names of ingredients that are common enough."""

    min_count: int = 10
    """Mentions in the training split that a name of an ingredient must have, with its variants."""


@dataclass
class UnifoodSettings:
    """The whole build; `configs/build/unifood.yaml` is an example."""

    sources: list[SourceSettings]
    """What to build from, one entry for each source."""
    name: str = "unifood"
    """What the records' `source` says in the end."""
    select: SelectSettings = field(default_factory=SelectSettings)
    """Settings of stage select."""
    categorise: CategorySettings = field(default_factory=CategorySettings)
    """Settings of stage categorise, and of the categories that select balances."""
    label: LabelSettings = field(default_factory=LabelSettings)
    """Settings of stage label."""
    aggregate: AggregateSettings = field(default_factory=AggregateSettings)
    """Settings of stage aggregate."""
    golden: GoldenSettings = field(default_factory=GoldenSettings)
    """Settings of stage golden."""
    shard: ShardSettings = field(default_factory=ShardSettings)
    """Settings of stage shard."""
    vocabulary: VocabularySettings = field(default_factory=VocabularySettings)
    """Settings of the vocabulary that stage statistics finds."""

    def check(self) -> None:
        """Checks beyond types; label and golden check their own. Raises SettingsError, naming the key."""
        if not self.sources:
            raise SettingsError("sources: expected at least one, got none")
        for i, source in enumerate(self.sources):
            if source.kind not in READERS:
                raise SettingsError(f"sources[{i}].kind: no such kind; {did_you_mean(source.kind, READERS)}")
        if self.name == "all":
            raise SettingsError('name: "all" stands for all sources together in the metrics; choose another')
        least = {
            "select.size": 1,
            "select.near_duplicate_bits": 0,
            "select.min_ingredients": 0,
            "select.max_ingredients": self.select.min_ingredients,
            "categorise.size": 0,
            "categorise.min_count": 1,
            "aggregate.micronutrient_coverage": 0,
            "aggregate.min_mass": 0,
            "aggregate.max_mass": self.aggregate.min_mass,
            "shard.size": 1,
            "vocabulary.min_count": 1,
        }
        for key, bound in least.items():
            part, _, name = key.partition(".")
            value = getattr(getattr(self, part), name)
            if not value >= bound:
                raise SettingsError(f"{key}: expected at least {bound:g}, got {value:g}")
        if self.select.near_duplicate_bits > MOST_BITS:
            raise SettingsError(
                f"select.near_duplicate_bits: expected at most {MOST_BITS}, got {self.select.near_duplicate_bits}"
            )
        if self.aggregate.micronutrient_coverage > 1:
            raise SettingsError(
                f"aggregate.micronutrient_coverage: expected at most 1, got {self.aggregate.micronutrient_coverage:g}"
            )
        try:
            hash_split("", self.select.split_fractions)
        except ValueError as error:
            raise SettingsError(f"select.split_fractions: {error}") from error
