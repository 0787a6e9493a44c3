"""Mixtures that read the same x by the CUDA kernels on the emulator: edges of tiles, what is skipped, launches, what moves."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from rode_kernels import backends
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.cuda.emulated import machine
from rode_kernels.backends.gpu import gemm_path
from rode_kernels.backends.gpu.plans import ProblemShape
from rode_kernels.backends.gpu.siblings import (
    Columns,
    plan_siblings_backward,
    plan_siblings_forward,
    say_one_by_one,
)
from rode_kernels.mixture import make_mixture
from rode_kernels.siblings import SiblingNeeds, mixtures_backward, mixtures_forward
from sibling_problems import PARAMETERS, check, random_siblings, run, siblings_of, with_dropout

if not backends()["cuda-emulated"].available:
    if os.environ.get("RODE_EMULATE") == "1":
        raise RuntimeError(backends()["cuda-emulated"].reason)
    pytest.skip(backends()["cuda-emulated"].reason, allow_module_level=True)
emulator = cuda_emulated.native
NAME = "cuda-emulated"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# float16 has the layout of bfloat16; the quick tests have all three
LONG_DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    machine.together, machine.gemm_path = True, False
    yield
    machine.seed, machine.multiprocessors, machine.gemm_path, machine.together = 0, 2, None, False
    machine.architecture = 86


def kernels() -> list[str]:
    return [launch["kernel"] for launch in emulator.launches()]


def sweep(
    dtype: torch.dtype,
    *,
    M: int,
    K: int,
    widths: tuple[int, ...],
    ranks: tuple[tuple[int, ...], ...],
    dropout: bool = False,
    seed: int = 0,
) -> None:
    """Few and many parts of K, O and tokens."""
    problems = random_siblings((M,), K=K, widths=widths, ranks=ranks, dtype=dtype, seed=seed)
    if dropout:
        problems = with_dropout(problems, 0.3, list(range(7, 7 + len(problems))))
    for machine.seed, machine.multiprocessors in ((seed, 1), (seed + 1, 7)):
        check(problems, NAME)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("M", "K", "widths", "ranks"),
    [
        (1, 64, (64, 72), ((2, 4, 8, 16), (3,))),
        (65, 33, (200, 19), ((3,), (9, 2, 1))),
        (33, 264, (129, 64, 8), ((2, 4, 8, 16), (8,), (17, 7))),
        (80, 72, (40, 392), ((40, 24), (1,) * 18)),
        (129, 136, (72, 16), ((8,), (16,))),
    ],
    ids=["one token", "odd", "three", "more columns", "few columns"],
)
def test_edges(dtype, M, K, widths, ranks):
    sweep(dtype, M=M, K=K, widths=widths, ranks=ranks, dropout=M % 2 == 1, seed=M)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
@pytest.mark.parametrize("dropout", [False, True])
def test_sweep(dtype, dropout):
    """K and O over whole, ragged and odd tiles; M around the edges of both tiles; columns that fill tiles and groups or not."""
    depth = 128 // dtype.itemsize
    for K in (1, 8, depth - 1, 2 * depth, 5 * depth + 8):
        for M in (15, 64, 129, 260):
            sweep(
                dtype,
                M=M,
                K=K,
                widths=(depth + 4, 8),
                ranks=((2, 4, 8, 16), (5,)),
                dropout=dropout,
                seed=K + M,
            )
    for ranks in (
        ((8,), (8,)),
        ((16, 16), (1,)),
        ((17,), (16,), (15,)),
        ((64,), (60, 4)),
        ((7,) * 9, (1,) * 16),
        ((100, 28), (3,)),
    ):
        widths = (72, 200, 33)[: len(ranks)]
        sweep(dtype, M=70, K=136, widths=widths, ranks=ranks, dropout=dropout, seed=len(ranks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_the_order_of_warps_and_blocks(dtype):
    problems = with_dropout(random_siblings((150,), K=200, widths=(160, 72), dtype=dtype), 0.2, [3, 4])
    machine.multiprocessors = 6
    results = []
    for machine.seed in range(3):
        results.append(run(problems, NAME))
    for other in results[1:]:
        assert torch.equal(results[0].dx, other.dx)
        assert all(map(torch.equal, results[0].ys, other.ys))
        for a, b in zip(results[0].grads, other.grads, strict=True):
            assert all(torch.equal(a[n], b[n]) for n in PARAMETERS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_by_pytorch_stand_in_for_the_launches_over_x(dtype, monkeypatch):
    """With more columns than one reading of x gives, and for dx where a single mixture of so many would take the GEMM path."""
    machine.gemm_path = None
    monkeypatch.setattr(
        cuda_emulated._passes, "prefer_gemm", lambda layout, backward=False: layout.shape.total_rank > 62
    )
    ranks = ((30, 30), (30, 30), (16,))
    many = random_siblings((130,), K=41, widths=(24, 8, 8), ranks=ranks, dtype=dtype)
    check(many, NAME)
    of_y = ["grad_output_pass", "gate_backward"] * 3
    assert kernels() == [*["pack_parameters"] * 3, *of_y, *["reduce_partials"] * 3]
    mixtures_forward(many[0].x, siblings_of(many), [None] * 3, backend=NAME)
    assert kernels() == [*["pack_parameters"] * 3, *["forward_expand"] * 3]
    for seeds in ([5, 5, 5], [5, 6, 7]):  # of which products know nothing
        check(with_dropout(many, 0.3, seeds), NAME)
        assert "grad_input_pass" in kernels()


def test_launches():
    """Those over x once for all; of what has no gradient or needs none, fewer."""
    problems = random_siblings((130,), K=128, widths=(128, 64), dtype=torch.bfloat16)
    siblings = siblings_of(problems)
    outputs = mixtures_forward(problems[0].x, siblings, [p.base.clone() for p in problems], backend=NAME)
    assert kernels() == [*["pack_parameters"] * 2, "forward_shrink", *["forward_expand"] * 2]

    def backward(dys, **kwargs) -> list[str]:
        saved = [(u, g) for _, u, g in outputs]
        mixtures_backward(problems[0].x, siblings, saved, dys, backend=NAME, **kwargs)
        return kernels()

    dys = [p.dy for p in problems]
    packs, of_y, of_all = (
        ["pack_parameters"] * 2,
        ["grad_output_pass", "gate_backward"] * 2,
        ["grad_input_pass"],
    )
    add = ["reduce_partials"] * 2
    assert backward(dys) == [*packs, *of_y, *of_all, *add]
    assert backward(dys, need_x=False) == [*of_y, *of_all, *add]
    frozen = [SiblingNeeds(*[False] * 4)] * 2
    assert backward(dys, needs=frozen) == [*packs, *of_y, *of_all]
    only_B = [SiblingNeeds(False, True, False, False)] * 2
    assert backward(dys, need_x=False, needs=only_B) == [*["grad_output_pass"] * 2, *add]
    # one sibling alone is a single call
    assert backward([None, problems[1].dy]) == [
        "grad_output_pass",
        "gate_backward",
        *of_all,
        "reduce_partials",
    ]


def loads(t: torch.Tensor) -> int:
    try:
        return emulator.traffic(t.data_ptr())[0]["bytes"]
    except KeyError:  # no kernel was given it
        return 0


def test_x_is_read_once_and_only_where_something_is_open_for_any():
    problems = random_siblings((200,), K=64, widths=(192, 64), dtype=torch.bfloat16)
    x = problems[0].x.clone()
    problems = [replace(p, x=x, dgates=None) for p in problems]
    run(problems, NAME)
    assert loads(x) == x.nbytes
    x[:, :2] = -20.0
    for j, (p, token) in enumerate(zip(problems, (70, 131), strict=True)):  # each has another token open
        p.router_bias.zero_()
        p.router_weight.zero_()
        p.router_weight[:, j] = 1.0
        x[token, j] = 20.0
    found = run(problems, NAME)
    assert loads(x) == 2 * 64 * 64 * 2  # the tiles of both tokens
    assert [loads(p.dy) for p in problems] == [16 * 192 * 2, 16 * 64 * 2]
    open_ = (found.dx != 0).any(1).nonzero().flatten().tolist()
    assert open_ == [70, 131]


@pytest.mark.parametrize("seeds", [None, [1, 1], [1, 2]], ids=["no dropout", "one mask", "own masks"])
def test_no_bank_conflicts(seeds):
    problems = random_siblings(
        (64,), K=512, widths=(832, 64), ranks=((2, 4, 8, 16), (40, 24)), dtype=torch.bfloat16
    )
    run(with_dropout(problems, 0.2, seeds) if seeds else problems, NAME)
    loaded, stored = emulator.shared_traffic()
    assert (loaded["conflicts"], stored["conflicts"]) == (0, 0)


@pytest.mark.parametrize("dtype", LONG_DTYPES, ids=str)
@pytest.mark.parametrize(
    "ranks",
    [
        ((8,), (16,)),
        ((2, 4, 8, 16), (3, 9)),
        ((30, 30), (17,), (40, 1)),
        ((40,), (9,), (16,), (5,)),
    ],
    ids=["few columns", "q and v", "three", "four"],
)
def test_masks_of_their_own_run_together(dtype, ranks):
    """In every kernel that makes them: few columns and many, blocks that have some of the mixtures, those that write dx and those
    that sum up. What is asked for alone has the same bits."""
    machine.architecture = 90
    problems = random_siblings((150,), K=136, widths=(72, 40, 24, 8)[: len(ranks)], ranks=ranks, dtype=dtype)
    problems = with_dropout(problems, 0.3, list(range(5, 5 + len(ranks))))
    found = check(problems, NAME)
    assert kernels().count("grad_input_pass") == 1
    only_x = run(problems, NAME, needs=[SiblingNeeds(*[False] * 4)] * len(ranks))
    assert torch.equal(only_x.dx, found.dx)
    without_x = run(problems, NAME, need_x=False)
    for some, all_ in zip(without_x.grads, found.grads, strict=True):
        assert all(torch.equal(some[n], all_[n]) for n in PARAMETERS)
    mixtures_forward(problems[0].x, siblings_of(problems), [None] * len(ranks), dropout_p=0.3, backend=NAME)
    assert kernels().count("forward_shrink") == 1


@pytest.mark.parametrize(("seeds", "copies"), [([5, 6, 7], 3), ([5, 5, 5], 1)], ids=["own masks", "one mask"])
def test_the_copies_of_the_gemm_path_are_made_from_one_reading_of_x(seeds, copies, monkeypatch):
    """In several parts of the tokens. (PyTorch's product for the routers is not counted.)"""
    machine.gemm_path = True
    monkeypatch.setattr(gemm_path, "SCRATCH_BYTES", 64 * 72 * 2 * copies)
    problems = random_siblings(
        (150,), K=72, widths=(24,) * 3, ranks=((40,), (3, 9), (16,)), dtype=torch.bfloat16
    )
    x = problems[0].x.clone()
    problems = with_dropout([replace(p, x=x) for p in problems], 0.3, seeds)
    check(problems, NAME)
    # of dA, then each mixture's part of dx, for each part of the tokens
    assert kernels().count("drop_rows") == 3 * 1 + -(-150 // (64 * copies)) * 3
    assert sum(loads(x[first:]) for first in range(0, 150, 64)) == x.nbytes
    mixtures_forward(x, siblings_of(problems), [None] * 3, dropout_p=0.3, backend=NAME)
    assert kernels().count("drop_rows") == 3
    assert sum(loads(x[first:]) for first in range(0, 150, 64)) == x.nbytes


@pytest.mark.parametrize("architecture", [86, 90])
@pytest.mark.parametrize(
    ("dtype", "ranks", "groups"),
    [
        (torch.bfloat16, ((8,), (16,)), {86: 4, 90: 5}),
        (torch.float32, ((8,), (16,)), {86: 5, 90: 5}),
        (torch.float32, ((30,), (17,)), {86: 4, 90: 4}),
        (torch.float32, ((8,), (16,), (4,)), {86: None, 90: 4}),
    ],
    ids=["5 groups", "5 groups of float32", "4 groups", "three masks"],
)
def test_where_masks_do_not_fit_another_plan_runs(architecture, dtype, ranks, groups):
    """4 groups at a time instead of 5, or one by one, which is said once."""
    say_one_by_one.cache_clear()
    plan_siblings_backward.cache_clear()
    machine.architecture = architecture
    problems = random_siblings((130,), K=72, widths=(24, 16, 8)[: len(ranks)], ranks=ranks, dtype=dtype)
    problems = with_dropout(problems, 0.3, list(range(3, 3 + len(ranks))))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            check(problems, NAME)
    messages = [str(w.message) for w in said if "one by one" in str(w.message)]
    if groups[architecture] is None:
        assert messages == [
            "rode_kernels: siblings whose masks of dropout do not fit the shared memory of the device run one by one, "
            "which reads x once for each of them and is slower"
        ]
        assert "pack_parameters" not in kernels()  # of a single call, the last one
        return
    assert messages == []
    (launch,) = (one for one in emulator.launches() if one["kernel"] == "grad_input_pass")
    assert launch["shared_bytes"] <= emulator.max_shared(architecture)
    blocks = launch["grid"][2]  # with 4 groups, blocks of their own write dx
    assert (blocks == 1) is (groups[architecture] == 5)


def test_more_experts_than_the_kernels_take_run_one_by_one():
    problems = random_siblings((5,), K=24, ranks=((1,) * 40, (1,) * 20), dtype=torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(problems, NAME)
    assert "pack_parameters" not in kernels()


def test_few_tokens_run_one_by_one_because_that_is_faster():
    shapes = [ProblemShape(1, 4096, 4096, 30, 4)] * 2
    mixture = make_mixture((2, 4, 8, 16), (1.0,) * 4)
    plans = {8: plan_siblings_forward, 16: plan_siblings_backward}
    for tokens, multiple, together in ((1, 8, False), (8192, 8, True), (8192, 16, True)):
        of = tuple(replace(s, tokens=tokens) for s in shapes)
        joint = Columns.of([mixture] * 2, multiple).shape(of)
        assert (plans[multiple](of, joint, 132, None, True) is not None) is together


def moved() -> int:
    return sum(direction["launch_used"] for direction in emulator.all_traffic())


def traffic(tokens: int, K: int, dropout_p: float, together: bool) -> tuple[int, int]:
    """Bytes of the forward and the backward pass of q and v, each tensor's distinct bytes once a launch."""
    problems = random_siblings(
        (tokens,), K=K, widths=(K, K), ranks=((2, 4, 8, 16),) * 2, dtype=torch.bfloat16
    )
    if dropout_p:
        problems = with_dropout(problems, dropout_p, [1, 2])
    x, siblings, total = problems[0].x, siblings_of(problems), [0, 0]
    groups = [problems] if together else [problems[:1], problems[1:]]
    for group in groups:
        of = siblings_of(group)
        how = dict(dropout_p=dropout_p, backend=NAME)
        outputs = mixtures_forward(x, of, [p.base for p in group], **how)
        total[0] += moved()
        mixtures_backward(x, of, [(u, g) for _, u, g in outputs], [p.dy for p in group], **how)
        total[1] += moved()
    assert len(siblings) == 2
    return total[0], total[1]


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
@pytest.mark.parametrize("K", [1024, pytest.param(4096, marks=pytest.mark.slow)])
def test_traffic_of_q_and_v_against_two_calls(K, dropout_p):
    """Of many tokens, for weights count once: what 64 tokens more add to the bytes."""
    machine.multiprocessors = 1
    ratios = []
    for together in (True, False):
        one, two = (traffic(tokens, K, dropout_p, together) for tokens in (64, 128))
        ratios.append([b - a for a, b in zip(one, two, strict=True)])
    forward, backward = (a / b for a, b in zip(*ratios, strict=True))
    print(f"K = O = {K}, dropout {dropout_p}: forward {forward:.3f}, backward {backward:.3f}")
    assert forward <= (0.85 if K == 4096 else 0.90)
    assert backward <= 0.75
