"""Dropout: Philox4x32-10 by its published vectors, the same bits on every backend, and the values under it."""

from __future__ import annotations

import pytest
import torch

from mixture_oracle import check, random_problem, with_dropout
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.reference import dropout_keep, philox

# kat_vectors of Random123, "philox4x32 10": counter, key, result. The operation uses counters (lo, hi, 0, 0); the full function is
# checked by driving its rounds through zero counters and keys of both halves.
ZERO = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """From the paper, with Python's integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_plain_philox_gives_the_published_vectors():
    assert plain_philox([0] * 4, [0] * 2) == list(ZERO)
    ones = 0xFFFFFFFF
    assert plain_philox([ones] * 4, [ones] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    assert plain_philox(pi, [0xA4093822, 0x299F31D0]) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("counter", [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 12345])
@pytest.mark.parametrize("key", [(0, 0), (1, 2), (0xFFFFFFFF, 0x12345678)])
def test_reference_philox(counter, key):
    words = philox(torch.tensor([counter]), key)
    want = plain_philox([counter & 0xFFFFFFFF, counter >> 32, 0, 0], list(key))
    assert [int(w) for w in words] == want


@pytest.mark.parametrize("first", [0, 1, 3, 62, 63, 64, 2**31 - 1, 2**33 + 5, 2**35 + 2])
@pytest.mark.parametrize("seed", [0, 7, -1, 2**62 + 3])
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_native_mask_follows_the_layout(first, seed, p):
    native = pytest.importorskip("rode_kernels._native")
    got = native.keep_mask(seed, p, first, 70)
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for i, keep in enumerate(got):
        e = first + i
        word = plain_philox([(e >> 2) & 0xFFFFFFFF, e >> 34, 0, 0], key)[e & 3]
        assert keep == float(word >= int(p * 2**32))


@pytest.mark.parametrize("first", [0, 64, 3, 2**33 + 5, 2**34 - 12, 2**34 - 7, 2**35 + 4])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 3])
@pytest.mark.parametrize("count", [1, 4])
def test_bits_of_the_cuda_kernels_follow_the_layout(first, seed, count):
    """Counters pass 2^32 at element 2^34, also in the middle of what a thread makes."""
    emulator = pytest.importorskip("rode_kernels._emulator_trial")
    threshold, out = int(0.3 * 2**32), torch.empty(32, dtype=torch.int32)
    emulator.reset(0)
    emulator.kept(count, first % 4 == 0, out.data_ptr(), first, seed, threshold)
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for piece, bits in enumerate(out.tolist()):
        for i in range(4 * count):
            e = first + piece * 4 * count + i
            word = plain_philox([(e >> 2) & 0xFFFFFFFF, e >> 34, 0, 0], key)[e & 3]
            assert bits >> i & 1 == (word >= threshold), (e, piece)


def test_reference_mask_is_the_native_one():
    native = pytest.importorskip("rode_kernels._native")
    keep = dropout_keep(torch.tensor([11]), 0.3, 5, 37, first_row=3)
    assert keep.reshape(-1).tolist() == [bool(k) for k in native.keep_mask(11, 0.3, 3 * 37, 5 * 37)]


@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("K", [24, 64, 101, 191, 300])
def test_values_and_gradients(backend, K, dtype, router):
    p = random_problem((35,), K=K, dtype=dtype, router=router)
    keep = dropout_keep(torch.tensor([77]), 0.25, 35, K)
    check(with_dropout(p, keep, 0.25, 77), backend=backend)


def test_dropping_everything_is_defined(backend):
    p = random_problem((10,))
    check(with_dropout(p, torch.zeros(10, 24, dtype=torch.bool), 0.999999999, 1), backend=backend)
    y = rectified_mixture(
        *(p.x, p.A, p.B, p.router_weight), ranks=p.ranks, scaling=p.scaling, dropout_p=1.0, backend=backend
    )
    assert (y == 0).all()


def test_keeps_the_right_share():
    keep = dropout_keep(torch.tensor([1]), 0.3, 1000, 1000)
    assert abs(keep.float().mean().item() - 0.7) < 0.002


def test_seed_follows_torchs_generator(backend):
    p = random_problem((20,))

    def call(**kwargs):
        return rectified_mixture(
            *(p.x, p.A, p.B, p.router_weight), ranks=p.ranks, scaling=p.scaling, backend=backend, **kwargs
        )

    torch.manual_seed(3)
    first, second = call(dropout_p=0.5), call(dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(call(dropout_p=0.5), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    call()
    assert torch.equal(torch.get_rng_state(), state), "no dropout must draw nothing"
    by_int, by_tensor = call(dropout_p=0.5, seed=-5), call(dropout_p=0.5, seed=torch.tensor([-5]))
    assert torch.equal(by_int, by_tensor)


def test_backends_agree_on_what_is_dropped():
    if not backends()["cpu"].available:
        pytest.skip("no native code")
    p = random_problem((20,), dtype=torch.float64)
    results = [
        rectified_mixture(
            *(p.x, p.A, p.B, p.router_weight),
            ranks=p.ranks,
            scaling=p.scaling,
            dropout_p=0.5,
            seed=1,
            backend=name,
        )
        for name in ("reference", "cpu")
    ]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)
