"""What `pytest -m gpu` captures in CUDA graphs, run here with a stand-in for the graph: the kernels and the gemm path, emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from captured import by_calling_again, check_replays
from mixture_oracle import random_problem
from rode_kernels import backends
from rode_kernels.backends.cuda import emulated as cuda_emulated


@pytest.fixture(params=["cpu", "cuda-emulated"])
def backend(request) -> str:
    status = backends()[request.param]
    if not status.available:
        pytest.skip(status.reason)
    return request.param


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    yield
    cuda_emulated.machine.gemm_path = None


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize(("ranks", "gemm_path"), [((2, 4, 8, 16), False), ((16,) * 8, True)])
def test_replays_of_both_passes(backend, ranks, gemm_path, dropout_p, inplace):
    cuda_emulated.machine.gemm_path = gemm_path
    p = random_problem((70,), K=64, O=48, ranks=ranks, dtype=torch.bfloat16, dropout_p=dropout_p)
    check_replays(p, by_calling_again, backend=backend, inplace=inplace)


def test_a_replay_that_does_not_see_new_values_is_noticed():
    p = random_problem((9,), dtype=torch.bfloat16)
    with pytest.raises(AssertionError):
        check_replays(p, lambda step: (step(), lambda: None), backend="reference")
