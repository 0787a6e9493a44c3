from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.unifood import near
from rode_food.unifood.near import near_any

# few bits set, so that near ones are common
words = st.lists(
    st.lists(st.integers(0, 63), max_size=5).map(lambda bits: sum(1 << b for b in set(bits))), max_size=12
)


def by_hand(hashes: np.ndarray, others: np.ndarray, bits: int) -> list[int]:
    found = []
    for one in hashes.tolist():
        hits = [i for i, other in enumerate(others.tolist()) if bin(one ^ other).count("1") <= bits]
        found.append(hits[0] if hits else -1)
    return found


@settings(max_examples=200, deadline=None)
@given(words, words, st.integers(0, 15))
def test_every_pair_is_found_and_no_other(one: list[int], two: list[int], bits: int) -> None:
    hashes, others = np.array(one, dtype=np.uint64), np.array(two, dtype=np.uint64)
    assert near_any(hashes, others, bits).tolist() == by_hand(hashes, others, bits)


def test_a_thousand_hashes_some_changed_in_a_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "_PAIRS", 50)  # many turns
    rng = np.random.default_rng(0)
    others = rng.integers(0, 2**64, 1000, dtype=np.uint64)
    flips = [sum(1 << int(b) for b in rng.choice(64, i % 8, replace=False)) for i in range(1000)]
    hashes = others[::-1] ^ np.array(flips, dtype=np.uint64)
    found = near_any(hashes, others, 4)
    assert found.tolist() == [999 - i if i % 8 <= 4 else -1 for i in range(1000)]


def test_pictures_that_all_share_a_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "_PAIRS", 10)
    hashes = np.arange(40, dtype=np.uint64)
    assert near_any(hashes, hashes[::-1].copy(), 0).tolist() == list(range(39, -1, -1))


def test_more_bits_than_bands_can_tell() -> None:
    with pytest.raises(ValueError, match="bits: expected 0 to 15, got 16"):
        near_any(np.zeros(1, np.uint64), np.zeros(1, np.uint64), 16)
