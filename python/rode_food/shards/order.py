"""The order in which an epoch reads shards: random, and yet only a few shards at a time."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate


def shuffle_blocks(sizes: Sequence[int], window: int, generator: random.Random) -> list[int]:
    """Every item once: shards in random order, and items shuffled among `window` shards in a row.

    So at any time items come from at most `window` shards, which the system's cache can hold, while an item still meets
    others from all over the data.

    Args:
        sizes: items of each shard; items are numbered through, shard by shard.
        window: shards that are shuffled together; as many as there are make a full shuffle.
        generator: its state alone decides.
    """
    if window < 1:
        raise ValueError(f"window: expected at least 1 shard, got {window}")
    ends = list(accumulate(sizes))
    shards = list(range(len(sizes)))
    generator.shuffle(shards)
    order: list[int] = []
    for first in range(0, len(shards), window):
        block = [item for s in shards[first : first + window] for item in range(ends[s] - sizes[s], ends[s])]
        generator.shuffle(block)
        order += block
    return order
