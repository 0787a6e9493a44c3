"""A part of a shard by its address: `/data/unifood-train-000012.tar#1536+61234`, a file, an offset and a size in bytes.

Where a picture's path goes, such an address goes as well (`rode_food.images.open_picture`).
"""

from __future__ import annotations

import os
import re
from functools import lru_cache

from rode_food.opening import ReadHandle

_ADDRESS = re.compile(r"(.+\.(?:tar|parquet))#(\d{1,19})\+(\d{1,19})", re.DOTALL)
OPEN_FILES = 64
"""Shards that a process holds open at most."""


class ShardError(OSError):
    """A shard that is missing, cut short or damaged. One line that names it."""


@lru_cache(OPEN_FILES)
def _handle(path: str) -> ReadHandle:
    return ReadHandle(path)


def forget_open_files() -> None:
    """For whoever opens shards that may have been written anew under the same name."""
    _handle.cache_clear()


def make_address(path: str, offset: int, size: int) -> str:
    return f"{path}#{offset}+{size}"


def parse_address(address: str) -> tuple[str, int, int] | None:
    """(path, offset, size), or None for a path of a file of its own."""
    found = _ADDRESS.fullmatch(address)
    return None if found is None else (found[1], int(found[2]), int(found[3]))


def read_part(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of a shard from `offset` on.

    Raises:
        ShardError: the shard is missing, or ends before.
    """
    try:
        handle = _handle(path)
        there = os.fstat(handle.number).st_size
        if offset + size > there:  # before a buffer of that size is made
            raise ShardError(
                f"{path}: cut short: expected {size} bytes at {offset}, and it has {there} bytes in all; copy it again"
            )
        data = handle.read(offset, size)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such shard") from None
    if len(data) != size:
        raise ShardError(
            f"{path}: cut short: expected {size} bytes at {offset}, got {len(data)}; copy it again"
        )
    return data
