"""What the shard stage can be told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class ShardSettings:
    format: Literal["webdataset", "parquet"] = "webdataset"
    size: int = 1000
    """Records of a shard."""
    on_bad_image: Literal["skip", "error"] = "error"
    """A picture that went or was spoiled since it was selected: stop, or leave its record out and say so."""
