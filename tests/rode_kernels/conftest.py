"""The conformance suite runs unchanged on every backend that is available here."""

from __future__ import annotations

import pytest
import torch

from mixture_oracle import WITHOUT_FLOAT64
from rode_kernels import backends

CONFORMING = ("reference", "cpu", "cuda-emulated")


@pytest.fixture(params=CONFORMING)
def backend(request) -> str:
    status = backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    if request.param in WITHOUT_FLOAT64 and torch.float64 in request.node.callspec.params.values():
        pytest.skip(f"backend {request.param} takes no float64")
    return request.param
