"""The error of float32 on the CUDA kernels beside plain PyTorch's, in numbers: the limits that docs/cuda.md states."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from mixture_oracle import Problem, eager, operation, oracle, random_problem, typical
from rode_kernels import backends
from rode_kernels.backends.cuda.emulated import machine

if not backends()["cuda-emulated"].available:
    if os.environ.get("RODE_EMULATE") == "1":
        raise RuntimeError(backends()["cuda-emulated"].reason)
    pytest.skip(backends()["cuda-emulated"].reason, allow_module_level=True)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    machine.gemm_path = False
    yield
    machine.gemm_path = None


def errors(p: Problem) -> dict[str, tuple[float, float]]:
    """The largest error of the kernels and of plain PyTorch in each result, in roundings (2^-23) of the terms that it sums."""
    result = operation(p, backend="cuda-emulated")
    open_ = result.gates > 0
    plain, truth, terms = (f(p, open_) for f in (eager, oracle, typical))
    found = {}
    for name in ("y", "gates", "x", "A", "B", "router_weight", "router_bias"):
        have, other, want, size = (
            getattr(r, name) if name in ("y", "gates") else r.grads[name]
            for r in (result, plain, truth, terms)
        )
        rounding = torch.finfo(torch.float32).eps * max(size.max().item(), want.abs().max().item())
        of_kernels, of_plain = ((t.double() - want).abs().max().item() for t in (have, other))
        found[name] = (of_kernels / rounding, of_plain / rounding) if rounding else (0.0, 0.0)
    return found


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        (dict(tokens=(4,), K=8, O=8, ranks=(2,)), 40),
        (dict(tokens=(4,), K=32, O=16, ranks=(4, 4)), 40),
        (dict(tokens=(16,), K=128, O=64), 12),
    ],
    ids=["K=8", "K=32", "K=128"],
)
def test_float32_errs_more_than_plain_PyTorch_on_tiny_problems(shape, count):
    """Tensor cores truncate three times for every 8 values that are summed; plain PyTorch rounds. The largest error of all
    results is up to 3.6 times as large on average, and always below the 16 roundings that `assert_as_accurate_as_eager` allows.
    A single result's can be the smaller one, by the order in which the processor's own product sums."""
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in range(count):
        for name, pair in errors(random_problem(**shape, seed=seed)).items():
            found.setdefault(name, []).append(pair)
    pairs = {name: torch.tensor(pair) for name, pair in found.items()}
    ratios = {name: (t[:, 0].mean() / t[:, 1].mean()).item() for name, t in pairs.items()}
    assert 1.8 < max(ratios.values()) < 3.6, ratios
    assert max(t[:, 0].max() for t in pairs.values()) < 12
    assert max(t[:, 1].max() for t in pairs.values()) < 8
