"""The conformance suite runs unchanged on every backend that is available here."""

from __future__ import annotations

import pytest

from rode_kernels import backends

CONFORMING = ("reference", "cpu")


@pytest.fixture(params=CONFORMING)
def backend(request) -> str:
    status = backends()[request.param]
    if not status.available:
        pytest.skip(f"backend {request.param}: {status.reason}")
    return request.param
