"""The CUDA emulator: a kernel without mistakes passes, every planted mistake is caught, layouts are the manual's.

The module under test is built with RODE_EMULATE=1, which `make test` sets.
"""

from __future__ import annotations

import os
import random
import re

import pytest
import torch

try:
    from rode_kernels import _emulator_trial as emulator
except ImportError as error:
    if os.environ.get("RODE_EMULATE") == "1":
        raise
    pytest.skip(f"needs a build with RODE_EMULATE=1 ({error})", allow_module_level=True)

SEEDS = range(20)


class Product:
    """x W^T on the emulator, and what it should be."""

    def __init__(self, M, N, K, *, dtype=torch.bfloat16, defined=False):
        generator = torch.Generator().manual_seed(M * 10007 + N * 101 + K)
        self.shape = (M, N, K)
        self.x = torch.randn(M, K, generator=generator).to(dtype)
        self.w = torch.randn(N, K, generator=generator).to(dtype)
        self.defined = defined  # whether y may be read before it is written
        self.copy = next(bytes for bytes in (16, 8, 4, 2) if K * 2 % bytes == 0)

    def run(self, seed=0, bug="none"):
        M, N, K = self.shape
        self.y = torch.zeros(M, N, dtype=self.x.dtype)
        emulator.reset(seed)
        if not self.defined:
            emulator.undefined(self.y.data_ptr(), self.y.nbytes)
        addresses = (t.data_ptr() for t in (self.x, self.w, self.y))
        emulator.product(*addresses, M, N, K, self.x.dtype == torch.half, self.copy, emulator.BUGS.index(bug))
        return self.y

    def assert_right(self):
        exact = self.x.double() @ self.w.double().T
        rounding = torch.finfo(self.x.dtype).eps / 2
        # one rounding to the 16-bit type, and float32 sums of K products
        sums = self.shape[2] * 2.0**-23 * (self.x.double().abs() @ self.w.double().abs().T)
        assert ((self.y.double() - exact).abs() <= rounding * exact.abs() + sums).all()


# M and N around the tile's edges; K over 1..2 x stages of tiles, whole and ragged, for every width of copy.
@pytest.mark.parametrize("K", [1, 8, 20, 62, 64, 65, 72, 128, 130, 192, 196, 257, 320, 384, 390])
@pytest.mark.parametrize(("M", "N"), [(1, 1), (31, 33), (32, 32), (33, 40), (64, 24)])
def test_a_product_without_mistakes_is_right_at_every_edge(M, N, K):
    dtype = torch.half if K % 3 == 0 else torch.bfloat16
    product = Product(M, N, K, dtype=dtype)
    product.run(seed=K)
    product.assert_right()


def test_a_product_without_mistakes_passes_whatever_the_order_of_warps_and_blocks():
    product = Product(40, 48, 200)
    results = {product.run(seed).view(torch.int16).numpy().tobytes() for seed in SEEDS}
    product.assert_right()
    assert len(results) == 1


# One of these, depending on which warp runs first.
RACE = "race in shared memory|an asynchronous copy is on its way|never written"
# The message, and a product on which the mistake matters.
CAUGHT = {
    "missing_wait": ("an asynchronous copy is on its way", {}),
    "early_wait": (RACE, {}),
    "off_by_one_wait": ("an asynchronous copy is on its way", {}),
    "missing_barrier": (RACE, {}),
    "wrong_stage": (RACE, {}),
    "missing_sync_warp": (RACE, {}),
    "global_load_out_of_bounds": ("cp_async from global memory out of bounds", {}),
    "global_store_out_of_bounds": ("global store out of bounds", {}),
    "shared_array_out_of_bounds": ("shared_array ends at byte", {}),
    "shared_load_out_of_bounds": ("ldmatrix out of bounds", {}),
    "misaligned_copy": ("cp_async from global memory misaligned", {}),
    "misaligned_store": ("global store misaligned", {}),
    "undefined_shared_read": ("read of shared memory that was never written", {}),
    "undefined_global_read": ("read of global memory that was never written", {}),
    "divergent_barrier": ("divergent barrier|by part of a warp", {}),
    "barrier_by_part_of_a_warp": ("sync_threads by part of a warp|divergent|sync_warp by part of a warp", {}),
    "early_return": ("divergent barrier: this warp has exited", dict(N=40)),
    "divergent_collective": ("ldmatrix by part of a warp", {}),
    "race_between_warps": ("race in global memory", dict(defined=True)),
    "race_between_blocks": ("race in global memory.*of another block", {}),
    "exit_in_flight": ("exits with asynchronous copies on their way", {}),
}


@pytest.mark.parametrize("bug", CAUGHT)
def test_a_planted_mistake_is_caught_on_every_seed(bug):
    message, shape = CAUGHT[bug]
    product = Product(**{"M": 40, "N": 48, "K": 300, **shape})
    for seed in SEEDS:
        with pytest.raises(emulator.EmulatorError, match=message) as caught:
            product.run(seed, bug)
        where = r"\S+kernels\.cuh:\d+: kernel product, block \(\d+, \d+, \d+\), thread \d+: "
        assert re.match(where, str(caught.value)), caught.value
    product.run(0)  # and the machine is none the worse for it
    product.assert_right()


def test_every_mistake_is_tried():
    assert set(emulator.BUGS) == {"none", "dropped_swizzle", *CAUGHT}


def test_warps_see_what_the_other_one_wrote_before_the_barrier():
    want = torch.arange(64, dtype=torch.int32)
    cells, total, other = want.clone(), torch.zeros_like(want), torch.arange(64) ^ 32
    for _ in range(3):
        total = total + want[other]
        want = total.clone()
    for seed in SEEDS:
        have = cells.clone()
        emulator.reset(seed)
        emulator.other_warp_rounds(have.data_ptr(), 64, 3)
        assert torch.equal(have, want)


READ, WRITE, SHARED, GLOBAL, SYNC_WARP, SYNC_BLOCK, COPY, WAIT = 0, 1, 0, 2, 4, 5, 6, 7


def run_script(script, *, seed, blocks=1):
    steps, cells = torch.tensor(script, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    emulator.reset(seed)
    emulator.scripted(steps.data_ptr(), len(script), blocks, cells.data_ptr())


def is_a_race(script) -> bool:
    """The definition: two accesses to a cell, one a write, by two threads that nothing orders."""
    for j, (what, block, thread, cell) in enumerate(script):
        for i, (what_before, block_before, thread_before, cell_before) in enumerate(script[:j]):
            between = [step[0] for step in script[i + 1 : j]]
            same_block = block == block_before
            ordered = same_block and (
                thread == thread_before
                or SYNC_BLOCK in between
                or (thread // 32 == thread_before // 32 and SYNC_WARP in between)
            )
            meet = (
                max(what, what_before) < SYNC_WARP
                and cell == cell_before
                and what // 2 == what_before // 2  # the same memory,
                and (
                    same_block or what // 2 * 2 == GLOBAL
                )  # which only blocks that are one share if it is shared
                and WRITE in (what % 2, what_before % 2)
            )
            if meet and not ordered:
                return True
    return False


def test_races_are_reported_exactly_where_there_is_one():
    choose, verdicts = random.Random(11), []
    for number in range(1000):
        blocks = choose.choice([1, 2])
        script = [(SHARED + WRITE, block, 0, cell) for block in range(blocks) for cell in range(2)]
        script.append((SYNC_BLOCK, 0, 0, 0))
        for _ in range(choose.randint(4, 14)):
            what = choose.choice([SHARED, SHARED, GLOBAL]) + choose.choice([READ, READ, WRITE])
            what = choose.choice([what, what, SYNC_WARP, SYNC_BLOCK])
            script.append(
                (what, choose.randrange(blocks), choose.choice([0, 1, 32, 33]), choose.randrange(2))
            )
        verdicts.append(is_a_race(script))
        for seed in range(3):
            try:
                run_script(script, seed=1000 * number + seed, blocks=blocks)
                found = None
            except emulator.EmulatorError as error:
                found = str(error)
                assert "race in " in found
            assert (found is not None) == verdicts[-1], f"{script}: {found}"
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.8, "the scripts try both"


BARRIER = (SYNC_BLOCK, 0, 0, 0)


@pytest.mark.parametrize(
    ("between", "after", "wrong"),
    [
        ([], [BARRIER, (GLOBAL + WRITE, 0, 40, 1)], None),
        ([], [(GLOBAL + WRITE, 0, 40, 1)], "race in global memory"),
        ([BARRIER, (GLOBAL + WRITE, 0, 40, 1)], [], "overwritten while|race in global memory"),
        ([BARRIER, (GLOBAL + WRITE, 0, 40, 1), BARRIER], [], "overwritten while this copy was on its way"),
    ],
)
def test_the_source_of_a_copy_is_read_until_it_lands(between, after, wrong):
    script = [(COPY, 0, 3, 1), *between, (WAIT, 0, 3, 0), *after]
    for seed in SEEDS:
        if wrong:
            with pytest.raises(emulator.EmulatorError, match=wrong):
                run_script(script, seed=seed)
        else:
            run_script(script, seed=seed)


@pytest.mark.parametrize(
    ("architecture", "kib"), [(80, 163), (86, 99), (89, 99), (90, 227), (100, 227), (120, 99)]
)
def test_a_launch_gets_the_shared_memory_of_its_architecture_and_no_more(architecture, kib):
    steps, cells = torch.tensor([BARRIER], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    launch = (steps.data_ptr(), 1, 1, cells.data_ptr())
    emulator.reset(0, architecture=architecture)
    emulator.scripted(*launch, shared_bytes=kib * 1024)
    why = (
        f"launch of scripted: it asks for {kib * 1024 + 4} bytes of shared memory, "
        f"a block on sm_{architecture} gets at most {kib * 1024}"
    )
    with pytest.raises(emulator.EmulatorError, match=f"^{why}$"):
        emulator.scripted(*launch, shared_bytes=kib * 1024 + 4)
    assert emulator.max_shared(architecture) == kib * 1024


def test_of_all_architectures_one_with_the_least_shared_memory_is_emulated_unless_it_is_said():
    steps, cells = torch.tensor([BARRIER], dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    emulator.reset(0, architecture=90)
    emulator.reset(0)
    with pytest.raises(emulator.EmulatorError, match=r"asks for 101380 bytes .* sm_86 gets at most 101376"):
        emulator.scripted(steps.data_ptr(), 1, 1, cells.data_ptr(), shared_bytes=101380)
    with pytest.raises(ValueError, match="knows the architectures 80, 86, 89, 90, 100 and 120, got 75"):
        emulator.reset(0, architecture=75)


def conflicts():
    loads, stores = emulator.shared_traffic()
    return loads["conflicts"], stores["conflicts"]


def test_a_dropped_swizzle_shows_in_the_count_of_bank_conflicts():
    product = Product(64, 64, 256)
    product.run()
    warps = 4 * 4
    # The main loop has none. Leaving, 8 lanes read 4 rows at a pitch of 48 bytes, of which two meet: once in each phase.
    assert conflicts() == (warps * 4, 0)
    product.run(bug="dropped_swizzle")
    product.assert_right()
    # 16 k-steps x 2 ldmatrix x 4 matrices, whose 8 rows then stand in the same banks
    assert conflicts() == (warps * (4 + 16 * 2 * 4 * 7), 0)


def test_traffic_is_counted_per_request_block_and_launch():
    M, N, K = 64, 96, 256
    product = Product(M, N, K)
    product.run()
    loads, stores = emulator.traffic(product.x.data_ptr())
    assert stores["bytes"] == 0
    assert loads["bytes"] == loads["used"] == 3 * M * K * 2  # each of 3 column tiles reads all of x
    assert loads["accesses"] == 3 * M * K // 8
    assert loads["requests"] * 32 == loads["accesses"]
    loads_w, _ = emulator.traffic(product.w.data_ptr())
    assert loads_w["bytes"] == 2 * N * K * 2
    aligned = product.x.data_ptr() % 32 == 0
    if aligned:
        assert loads["sectors"] == loads["block_sectors"] == 3 * M * K * 2 // 32
        assert loads["launch_sectors"] == M * K * 2 // 32
    assert loads["launch_used"] == M * K * 2
    _, stored = emulator.traffic(product.y.data_ptr())
    assert stored["bytes"] == stored["launch_used"] == M * N * 2
    (launch,) = emulator.launches()
    assert (launch["kernel"], launch["grid"], launch["threads"]) == ("product", (2, 3, 1), 128)


def test_sectors_are_counted_once_for_a_warp_a_block_and_a_launch():
    steps = torch.tensor([(GLOBAL + READ, 0, 0, 0)] * 8, dtype=torch.int32)  # 128 bytes: 4 sectors
    cells = torch.zeros(4, dtype=torch.int32)
    emulator.reset(0)
    emulator.scripted(steps.data_ptr(), 8, 2, cells.data_ptr())
    loads, _ = emulator.traffic(steps.data_ptr())
    # each of 2 warps reads the words of a step one by one: 4 in block 0, and 3 in block 1, which the step does not mean
    assert loads["requests"] == loads["sectors"] == 2 * 8 * (4 + 3)
    assert loads["accesses"] == 32 * loads["requests"]
    assert loads["used"] == 4 * loads["requests"]
    first = steps.data_ptr() // 32
    sectors = (steps.data_ptr() + 127) // 32 - first + 1
    assert loads["block_sectors"] == 2 * sectors
    assert loads["launch_sectors"] == sectors
    assert loads["launch_used"] == 128


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma_is_a_product_with_the_manuals_fragments(kind):
    depth = 8 if kind == "tf32" else 16
    a, b, c = torch.randn(16, depth), torch.randn(depth, 8), torch.randn(16, 8)
    rounded = {
        "bf16": lambda t: t.bfloat16().double(),
        "f16": lambda t: t.half().double(),
        "tf32": lambda t: ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double(),
    }[kind]
    exact = c.double() + rounded(a) @ rounded(b)
    emulator.reset(3)
    emulator.mma(kind, a.data_ptr(), b.data_ptr(), c.data_ptr())
    torch.testing.assert_close(c.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("n", "transpose"), [(2, False), (4, False), (4, True)])
def test_ldmatrix_gives_each_lane_its_pair(n, transpose):
    matrices = torch.randperm(n * 64).to(torch.int16).reshape(n, 8, 8)
    out = torch.empty(n, 32, 2, dtype=torch.int16)
    emulator.reset(n)
    emulator.ldmatrix(n, transpose, matrices.data_ptr(), out.data_ptr())
    # lane l holds elements (l / 4, 2 (l % 4)) and the next one of each matrix
    expected = (matrices.transpose(1, 2) if transpose else matrices).reshape(n, 32, 2)
    assert torch.equal(out, expected)


def test_shuffles_and_votes():
    mine, out = torch.arange(100, 164, dtype=torch.int32), torch.empty(3, 64, dtype=torch.int32)
    mine[40] = 7
    emulator.reset(0)
    emulator.exchanges(mine.data_ptr(), out.data_ptr())
    warps = mine.reshape(2, 32)
    assert torch.equal(out[0], warps.roll(16, 1).flatten())
    bits = ((warps % 3 == 0).long() << torch.arange(32)).sum(1)
    assert torch.equal(out[1].long() & 0xFFFFFFFF, bits.repeat_interleave(32))
    assert out[2].eq(1).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions_round_as_torch_does(kind):
    dtype = {"bf16": torch.bfloat16, "f16": torch.half}[kind]
    large = torch.tensor(
        [0.0, -0.0, 65504.0, 65519.9, 65520.0, 1e30, -3.4e38, float("inf"), -float("inf"), float("nan")]
    )
    small = torch.tensor([1.0, 1 - 2.0**-12, 2.0**-10, 2.0**-11, 1.5 * 2.0**-11, 1e-26]) * 2.0**-14
    x = torch.cat([large, small, torch.randn(4000) * 10.0 ** torch.randint(-9, 6, (4000,))])
    y = torch.empty_like(x)
    emulator.reset(0)
    emulator.round_trip(kind, x.data_ptr(), y.data_ptr(), x.numel())
    torch.testing.assert_close(y, x.to(dtype).float(), rtol=0, atol=0, equal_nan=True)
