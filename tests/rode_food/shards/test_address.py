"""Addresses of parts of shards, read by threads, forks and where there is no pread."""

from __future__ import annotations

import os
import random
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forked import forked
from rode_food.images import open_picture
from rode_food.shards import address
from rode_food.shards.address import make_address, parse_address, read_part


@given(
    st.text(min_size=1), st.sampled_from([".tar", ".parquet"]), st.integers(0, 2**60), st.integers(0, 2**32)
)
def test_an_address_says_what_it_was_made_of(name, suffix, offset, size):
    assert parse_address(make_address(name + suffix, offset, size)) == (name + suffix, offset, size)


@pytest.mark.parametrize(
    "path", ["a.jpg", "a.tar", "a.tar#1", "a.tar#1+", "a.jpg#1+2", "#1+2", "a#1+2.jpg", "a.tar#-1+2"]
)
def test_paths_are_no_addresses(path):
    assert parse_address(path) is None


@pytest.fixture
def files(tmp_path):
    """Five files of 10 kB whose every four bytes say where they are."""
    made = []
    for number in range(5):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(b"".join((number << 24 | place).to_bytes(4, "little") for place in range(2500)))
        made.append(str(path))
    return made


def expected(number, place, count):
    return b"".join((number << 24 | p).to_bytes(4, "little") for p in range(place, place + count))


def read_at_random(files, seed):
    generator = random.Random(seed)
    for _ in range(300):
        number, place, count = generator.randrange(5), generator.randrange(2000), generator.randrange(500)
        assert read_part(files[number], 4 * place, 4 * count) == expected(number, place, count)


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 10_001), (9_999, 2), (2**60, 4), (0, 2**60), (2**62, 2**62)]
)
def test_an_address_beyond_the_end_is_one_error(files, offset, size):
    """No buffer of an exabyte is asked for."""
    with pytest.raises(address.ShardError, match=f"cut short: expected {size} bytes at {offset}"):
        read_part(files[0], offset, size)
    assert parse_address("a.tar#" + "9" * 5000 + "+4") is None


@pytest.mark.parametrize("open_files", [1, 64])
def test_threads_read_while_files_are_closed_under_them(files, monkeypatch, open_files):
    monkeypatch.setattr(address, "_handle", lru_cache(open_files)(address.ReadHandle))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: read_at_random(files, seed), range(8)))


def test_few_files_are_open(files, monkeypatch):
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(address, "_handle", lru_cache(2)(address.ReadHandle))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        for path in files:
            read_part(path, 0, 4)
    assert len(os.listdir("/proc/self/fd")) == before + 2
    address.forget_open_files()
    assert len(os.listdir("/proc/self/fd")) == before


def test_forks_read_through_what_they_inherit(files):
    read_at_random(files, 0)
    assert [forked(lambda: read_at_random(files, 1)) for _ in range(2)] == [0, 0]
    read_at_random(files, 2)


def test_without_pread(files, monkeypatch):
    monkeypatch.delattr(os, "pread", raising=False)
    read_at_random(files, 3)
    with open_picture(make_address(files[1], 8, 4)) as file:
        assert file.read() == expected(1, 2, 1)
