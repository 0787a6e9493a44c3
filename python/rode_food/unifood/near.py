"""Near-duplicate pictures: perceptual hashes that differ in a few bits."""

from __future__ import annotations

import itertools

import numpy as np

MOST_BITS = 15
_PAIRS = 4_000_000  # compared at a time: 100 MB


def _count_bits(values: np.ndarray) -> np.ndarray:
    if hasattr(np, "bitwise_count"):  # NumPy 2
        counts: np.ndarray = np.bitwise_count(values)
    else:
        counts = np.unpackbits(values.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
    return counts


def near_any(hashes: np.ndarray, others: np.ndarray, bits: int) -> np.ndarray:
    """For every hash the index of the first of `others` that differs from it in at most `bits` bits, else -1.

    The 64 bits are cut into `bits + 1` bands: two hashes so near agree in one of them at least, so only those that share a
    band are compared. Memory is bounded; time is, for hashes that spread, a few comparisons each.

    Args:
        hashes: uint64 (n,).
        others: uint64 (m,).
        bits: 0 to `MOST_BITS`.

    Returns:
        int64 (n,).
    """
    if not 0 <= bits <= MOST_BITS:
        raise ValueError(f"bits: expected 0 to {MOST_BITS}, got {bits}")
    found = np.full(len(hashes), len(others), dtype=np.int64)
    edges = np.linspace(0, 64, bits + 2).astype(int)
    for low, high in itertools.pairwise(edges):
        mask = np.uint64((1 << (int(high) - int(low))) - 1)
        band = (hashes >> np.uint64(low)) & mask
        other_band = (others >> np.uint64(low)) & mask
        order = np.argsort(other_band, kind="stable")
        ordered = other_band[order]
        first = np.searchsorted(ordered, band, "left")
        count = np.searchsorted(ordered, band, "right") - first
        total = np.concatenate([[0], np.cumsum(count)])
        start = 0
        while start < len(hashes):
            # one hash at least, however many it shares the band with
            stop = max(start + 1, int(np.searchsorted(total, total[start] + _PAIRS, "right")) - 1)
            n = count[start:stop]
            left = np.repeat(np.arange(start, stop), n)
            right = order[np.arange(n.sum()) - np.repeat(total[start:stop] - total[start], n) + first[left]]
            near = _count_bits(hashes[left] ^ others[right]) <= bits
            np.minimum.at(found, left[near], right[near])
            start = stop
    return np.where(found == len(others), -1, found)
