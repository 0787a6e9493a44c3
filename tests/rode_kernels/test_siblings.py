"""Mixtures that read the same x, together, on every backend that is available here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mixture_oracle import MIXED, threads
from rode_kernels import backends
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.gpu import gemm_path
from rode_kernels.backends.reference import dropout_keep
from rode_kernels.backends.registry import select_backend
from rode_kernels.backends.triton import backend as triton
from rode_kernels.mixture import make_mixture
from rode_kernels.siblings import Sibling, SiblingNeeds, mixtures_backward, mixtures_forward
from sibling_problems import PARAMETERS, check, random_siblings, run, siblings_of, with_dropout

ONE_PASS = ("reference", "cpu", "cuda-emulated", "triton")  # backends that take siblings together
SHAPES = {
    "few tokens": dict(tokens=(5,), K=24),
    "small": dict(tokens=(66,), K=24, widths=(20, 12), ranks=((2, 3), (5,))),
    "q and v": dict(tokens=(2, 83), K=136, widths=(72, 40)),
    "q, k, v": dict(tokens=(130,), K=200, widths=(72, 24, 24), ranks=((2, 4, 8, 16), (8,), (1, 1, 30))),
    "odd": dict(tokens=(141,), K=33, widths=(19, 130), ranks=((3,), (5, 7, 9))),
}


@pytest.fixture(autouse=True)
def together(monkeypatch) -> None:
    """Together also where one by one is faster."""
    monkeypatch.setattr(cuda_emulated.machine, "together", True)


@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(backend, shape, dtype, parameter_dtype):
    check(random_siblings(**SHAPES[shape], dtype=dtype, parameter_dtype=parameter_dtype), backend)


@pytest.mark.parametrize("seeds", [[7, 7], [7, 8]], ids=["one mask", "own masks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(backend, dtype, seeds):
    problems = random_siblings((133,), K=72, dtype=dtype)
    check(with_dropout(problems, 0.3, seeds), backend)


@pytest.mark.parametrize("seeds", [[7, 7], [7, 8]], ids=["one mask", "own masks"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED[1:], ids=str)
def test_dropout_of_wide_mixtures(backend, dtype, parameter_dtype, seeds):
    """For which PyTorch's products serve single calls."""
    ranks = ((70, 20), (40,))
    problems = random_siblings(
        (70,), K=40, widths=(24, 16), ranks=ranks, dtype=dtype, parameter_dtype=parameter_dtype
    )
    check(with_dropout(problems, 0.3, seeds), backend)


def found_masks(backend: str, dtype: torch.dtype, R: int, seeds: list[int]) -> list[tuple[torch.Tensor, ...]]:
    """What each sibling keeps of x, at probability 0.5: by u, by dx and by dA, from products that are exact in every dtype."""
    parts, ones = 4, torch.ones(R, R, dtype=dtype)
    identity, M = torch.eye(R, dtype=dtype), parts * R
    own = {seed: torch.tensor([seed]) for seed in seeds}
    routers = torch.zeros(1, R, dtype=dtype), torch.ones(1, dtype=dtype)  # every gate is 1
    first, then = (
        [
            Sibling(A, identity, *routers, make_mixture((R,), (0.5 * 2**j,)), own[seed])
            for j, seed in enumerate(seeds)
        ]
        for A in (identity, ones)
    )
    outputs = mixtures_forward(
        torch.ones(M, R, dtype=dtype), first, [None] * len(seeds), dropout_p=0.5, backend=backend
    )
    # tokens m, m + R, .. count in row m of dA, each with its own power of two
    x = torch.tensor([2.0**i for i in range(parts)]).repeat_interleave(R)[:, None].expand(M, R).to(dtype)
    dx, grads = mixtures_backward(
        x.contiguous(),
        then,
        [(u, g) for _, u, g in outputs],
        [identity.repeat(parts, 1)] * len(seeds),
        dropout_p=0.5,
        backend=backend,
    )
    found = []
    for j, ((_, u, _), grad) in enumerate(zip(outputs, grads, strict=True)):
        of_A = (grad.A / 2**j).long()
        bits = torch.cat([of_A >> i & 1 for i in range(parts)])
        found.append((u.bool(), (dx.long() >> j & 1).bool(), bits.bool()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seeds", [[7, 8], [8, 7, 9]], ids=["q and v, small", "q, k and v, small"])
@pytest.mark.parametrize("R", [24, 66], ids=["kernels", "products"])
def test_each_sibling_drops_what_it_drops_alone(backend, dtype, seeds, R):
    """To the bit, forward and backward."""
    for seed, masks in zip(seeds, found_masks(backend, dtype, R, seeds), strict=True):
        keep = dropout_keep(torch.tensor([seed]), 0.5, 4 * R, R)
        for mask, where in zip(masks, ("u", "dx", "dA"), strict=True):
            assert torch.equal(mask, keep), f"{where} of the sibling with seed {seed}"


@pytest.mark.parametrize("mistake", ["exchanged", "one for all"])
@pytest.mark.parametrize("R", [24, 66], ids=["kernels", "products"])
@pytest.mark.parametrize("name", ["cuda-emulated", "triton"])
def test_seeds_of_other_siblings_are_noticed(name, R, mistake, monkeypatch):
    """By the test of masks above, and by values."""
    status = backends()[name]
    if not status.available:
        pytest.skip(f"backend {name}: {status.reason}")
    module = select_backend(name, torch.zeros(1, 1), 1, make_mixture((1,), (1.0,)))
    plain = {pass_: getattr(module, f"{pass_}_siblings") for pass_ in ("forward", "backward")}

    def wrong(pass_: str):
        def run_wrong(operands, *rest):
            seeds = [o.seed for o in operands]
            seeds = seeds[::-1] if mistake == "exchanged" else [seeds[0]] * len(seeds)
            given = [o._replace(seed=seed) for o, seed in zip(operands, seeds, strict=True)]
            return plain[pass_](given, *rest)

        return run_wrong

    for pass_, places in (("forward", (0,)), ("backward", (1, 2))):
        with monkeypatch.context() as planted:
            planted.setattr(module, f"{pass_}_siblings", wrong(pass_))
            found = found_masks(name, torch.bfloat16, R, [7, 8])
            problems = with_dropout(random_siblings((133,), K=72, dtype=torch.bfloat16), 0.3, [7, 8])
            with pytest.raises(AssertionError):
                check(problems, name)
        keep = dropout_keep(torch.tensor([8]), 0.5, 4 * R, R)
        assert not any(torch.equal(found[1][place], keep) for place in places)


def test_closed_and_open_experts_side_by_side(backend):
    """Nothing is open for the first, everything for the second."""
    problems = random_siblings((140,), K=64)
    problems[0].router_bias.fill_(-1e9)
    problems[1].router_bias.fill_(10.0)
    found = check(problems, backend)
    assert torch.equal(found.ys[0], problems[0].base)
    assert (found.grads[0]["A"] == 0).all()


def test_a_closed_experts_values_reach_nothing(backend):
    """Not even if they are not finite, in u that is saved, and in dx."""
    problems = random_siblings((140,), K=64, dgates=False)
    problems[0].router_bias[0] = -1e9
    found = run(problems, backend)
    assert (found.us[0][:, :2] == 0).all()
    assert all(t.isfinite().all() for t in (*found.ys, found.dx))


def test_without_a_base_or_a_bias(backend):
    check(random_siblings((130,), K=40, base=False, bias=False), backend)


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1)], ids=str)
def test_no_gradient_reaches_some(backend, without):
    """dy of some is None; their gates still have a gradient, or nothing has."""
    problems = random_siblings((130,), K=40)
    check(problems, backend, without_dy=without)
    no_gates = [replace(p, dgates=None) for p in problems]
    found = check(no_gates, backend, without_dy=without)
    assert all((found.grads[j]["B"] == 0).all() for j in without)


def test_only_what_is_asked_for(backend):
    problems = random_siblings((130,), K=40, widths=(24, 32), ranks=((4, 8), (3, 9)))
    everything = run(problems, backend)
    for j, name in enumerate(PARAMETERS):
        needs = [SiblingNeeds(*(n == name for n in PARAMETERS)), SiblingNeeds(*[False] * 4)]
        found = run(problems, backend, need_x=False, needs=needs)
        assert found.dx is None
        assert all(g is None for g in found.grads[1].values())
        for n, grad in found.grads[0].items():
            assert (grad is None) == (n != name)
        torch.testing.assert_close(found.grads[0][name], everything.grads[0][name], rtol=1e-4, atol=1e-4)
        alone = run(problems, backend, needs=[needs[1], needs[j % 2]])
        torch.testing.assert_close(alone.dx, everything.dx, rtol=1e-4, atol=1e-4)


def test_strides(backend):
    """x, base and dy are parts of something larger, or dy the gradient of a sum."""
    problems = random_siblings((130,), K=40, widths=(24, 32), ranks=((4, 8), (3, 9)))
    plain = run(problems, backend)
    wide = torch.cat([problems[0].x, problems[0].x], 1)[:, :40]
    for p in problems:
        p.x = wide
        p.dy = torch.cat([p.dy, p.dy], 1)[:, : p.dy.shape[1]]
    strided = run(problems, backend)
    for a, b in zip((*plain.ys, plain.dx), (*strided.ys, strided.dx), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    ones = [torch.ones(()).expand(p.dy.shape) for p in problems]
    summed = run([replace(p, dy=one) for p, one in zip(problems, ones, strict=True)], backend)
    full = run([replace(p, dy=one.contiguous()) for p, one in zip(problems, ones, strict=True)], backend)
    torch.testing.assert_close(summed.dx, full.dx, rtol=1e-5, atol=1e-5)


def test_a_base_whose_rows_do_not_flatten_is_written():
    problems = random_siblings((2, 70), K=40)
    whole = [torch.zeros(2, 90, p.base.shape[-1]) for p in problems]
    bases = [w[:, :70].copy_(p.base) for w, p in zip(whole, problems, strict=True)]
    outputs = mixtures_forward(problems[0].x, siblings_of(problems), bases)
    for (y, _, _), base, other in zip(outputs, bases, run(problems, "cpu").ys, strict=True):
        assert y is base
        torch.testing.assert_close(base, other)


def test_no_tokens(backend):
    found = run(random_siblings((0,), K=40), backend)
    assert found.dx.shape == (0, 40)
    assert all((g == 0).all() for grads in found.grads for g in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_every_number_of_threads(dtype):
    problems = random_siblings(
        (700,), K=328, widths=(200, 96, 40), ranks=((2, 4, 8, 16), (8,), (30,)), dtype=dtype
    )
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(problems, "cpu"))
    for other in results[1:]:
        assert torch.equal(results[0].dx, other.dx)
        for name in ("ys", "us", "gs"):
            assert all(map(torch.equal, getattr(results[0], name), getattr(other, name)))
        for a, b in zip(results[0].grads, other.grads, strict=True):
            assert all(torch.equal(a[n], b[n]) for n in PARAMETERS)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass_runs_where_a_backend_has_it(name, dropout_p, monkeypatch):
    """And gives what single calls give, which do not run."""
    status = backends()[name]
    if not status.available:
        pytest.skip(f"backend {name}: {status.reason}")
    module = select_backend(name, torch.zeros(1, 1), 1, make_mixture((1,), (1.0,)))
    problems = random_siblings((150,), K=72, dtype=torch.bfloat16)
    if dropout_p:
        problems = with_dropout(problems, dropout_p, [7, 8])
    with monkeypatch.context() as alone:
        alone.setattr(module, "forward_siblings", lambda *_: None)
        alone.setattr(module, "backward_siblings", lambda *_: None)
        singly = run(problems, name)
    if name != "reference":
        monkeypatch.setattr(module, "forward", None)
        monkeypatch.setattr(module, "backward", None)
    together = run(problems, name)
    pairs = zip((*singly.ys, *singly.gs, singly.dx), (*together.ys, *together.gs, together.dx), strict=True)
    for a, b in pairs:
        assert (a.double() - b.double()).norm() <= 2**-7 * b.double().norm()


@pytest.mark.parametrize("name", ["cuda-emulated", "triton"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED[1:], ids=str)
def test_products_by_pytorch(name, dtype, parameter_dtype, monkeypatch):
    """The GEMM path of siblings, small and so not slow on Triton's interpreter."""
    status = backends()[name]
    if not status.available:
        pytest.skip(f"backend {name}: {status.reason}")
    monkeypatch.setattr(cuda_emulated.machine, "gemm_path", True)
    monkeypatch.setattr(triton, "prefer_gemm_always", True)
    problems = random_siblings(
        (66,), K=24, widths=(20, 12), ranks=((2, 3), (5,)), dtype=dtype, parameter_dtype=parameter_dtype
    )
    check(problems, name)
    if name == "cuda-emulated":  # Triton's has no dropout
        monkeypatch.setattr(gemm_path, "SCRATCH_BYTES", 1000)  # several parts of the tokens
        check(with_dropout(problems, 0.3, [7, 8]), name)
        assert cuda_emulated.native.launches()[-1]["kernel"] == "drop_rows"
    problems[0].dy = problems[0].dy[:, :1].expand(problems[0].dy.shape)
    check(problems, name, without_dy=(1,))
    only_B = [SiblingNeeds(False, True, False, False)] * 2
    found = run(problems, name, need_x=False, needs=only_B)
    assert found.dx is None
    assert found.grads[0]["A"] is None
