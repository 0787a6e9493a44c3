"""What a build is made from and how: one YAML file, checked key by key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rode.data.unifood.golden.settings import GoldenSettings
from rode.data.unifood.label.settings import LabelSettings
from rode.data.unifood.shard_settings import ShardSettings


@dataclass
class SourceSettings:
    """One source in its publisher's layout."""

    kind: str
    """A key of `rode.data.readers.READERS`."""
    path: str
    """Its folder (a file for kind `records`)."""


@dataclass
class SelectSettings:
    size: int = 100_000
    """Records of all splits together; fewer where the sources have fewer."""
    images_per_recipe: int = 1
    near_duplicate_bits: int = 4
    """Pictures whose 64-bit perceptual hashes differ in at most so many bits are one picture."""
    on_bad_image: Literal["skip", "error"] = "skip"
    min_ingredients: int = 2
    max_ingredients: int = 19
    seed: int = 0


@dataclass
class CategorySettings:
    size: int = 100
    """Categories to find; what fits none is `other`."""
    min_count: int = 10


@dataclass
class UnifoodSettings:
    """The whole build; `recipes/unifood-build.yaml` is an example."""

    sources: list[SourceSettings]
    name: str = "unifood"
    """What the records' `source` says in the end."""
    select: SelectSettings = field(default_factory=SelectSettings)
    categorise: CategorySettings = field(default_factory=CategorySettings)
    label: LabelSettings = field(default_factory=LabelSettings)
    golden: GoldenSettings = field(default_factory=GoldenSettings)
    shard: ShardSettings = field(default_factory=ShardSettings)
