"""The conformance suite runs unchanged on every backend that is available here."""

from __future__ import annotations

import zlib

import pytest
import torch

from mixture_oracle import ON_GPUS
from rode_kernels import backends, fast_path
from rode_kernels.backends.cuda import emulated as cuda_emulated

CONFORMING = ("reference", "cpu", "cuda-emulated", "triton")


_LONG_IN_TRITON = (
    "test_random_problems[triton",
    "test_bits_do_not_depend_on_threads_or_run[triton",
    "test_values[triton",  # of the GEMM path
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Triton's interpreter takes a second for what others take milliseconds for: a quarter of the sweep at every change, the rest
    among the long tests."""
    for item in items:
        long = item.name.startswith(_LONG_IN_TRITON)
        swept = (
            item.name.startswith("test_values_and_gradients[triton")
            and "small" not in item.name
            and zlib.crc32(item.name.encode()) % 4
        )
        siblings = "[triton" in item.name and "test_siblings.py" in item.nodeid and "small" not in item.name
        if long or swept or siblings:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=CONFORMING)
def backend(request, monkeypatch) -> str:
    status = backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    if request.param in ON_GPUS and torch.float64 in request.node.callspec.params.values():
        pytest.skip(f"backend {request.param} takes no float64")
    if request.param == "cuda-emulated":  # warps and blocks in another order for each test
        monkeypatch.setattr(cuda_emulated.machine, "seed", zlib.crc32(request.node.name.encode()))
    return request.param


@pytest.fixture
def nothing_known(monkeypatch):
    """No call was prepared before, and the environment names no backend."""
    monkeypatch.setattr(fast_path, "_known", {})
    monkeypatch.delenv("RODE_BACKEND", raising=False)


@pytest.fixture
def sums_in_order(monkeypatch):
    """The interpreter's products are numpy's, which picks an order of summation by shape. Here k after k, as a GPU does."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(total.dtype) * b.data[None, k].astype(total.dtype)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)
