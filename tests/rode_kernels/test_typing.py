"""Type checkers know whether a call returns gates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

CALLS = """
from typing import assert_type
from torch import Tensor
from rode_kernels import AdaptedLinear, RectifiedMixture, rectified_linear, rectified_linears, rectified_mixture

def calls(t: Tensor, n: list[int], f: list[float], either: bool, layers: list[AdaptedLinear], layer: RectifiedMixture) -> None:
    assert_type(rectified_mixture(t, t, t, t, ranks=n, scaling=f), Tensor)
    assert_type(rectified_mixture(t, t, t, t, t, ranks=n, scaling=f, return_gates=False), Tensor)
    assert_type(rectified_mixture(t, t, t, t, ranks=n, scaling=f, return_gates=True), tuple[Tensor, Tensor])
    assert_type(rectified_mixture(t, t, t, t, ranks=n, scaling=f, return_gates=either), Tensor | tuple[Tensor, Tensor])
    assert_type(rectified_linear(t, t, None, t, t, t, ranks=n, scaling=f), Tensor)
    assert_type(rectified_linear(t, t, None, t, t, t, ranks=n, scaling=f, return_gates=True), tuple[Tensor, Tensor])
    assert_type(rectified_linears(t, layers), list[Tensor])
    assert_type(rectified_linears(t, layers, return_gates=True), list[tuple[Tensor, Tensor]])
    assert_type(layer.forward(t), Tensor)
"""


@pytest.mark.slow
def test_mypy_knows_whether_a_call_returns_gates(tmp_path):
    pytest.importorskip("mypy")
    calls = tmp_path / "calls.py"
    calls.write_text(CALLS)
    command = [
        *(sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache")),
        str(calls),
    ]
    # followed, and not reported on: the package's own errors are `make lint`'s to find
    run = subprocess.run(
        [*command, "--follow-imports", "silent", "--config-file", str(ROOT / "pyproject.toml")],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr
