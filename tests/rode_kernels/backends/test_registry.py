"""Which backend is picked, what is said of the others, and that the core is sound without native code."""

from __future__ import annotations

import subprocess
import sys

import torch

from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.registry import select_backend
from rode_kernels.mixture import make_mixture


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_every_status_has_a_reason():
    for name, status in backends().items():
        assert status.name == name
        assert status.reason


def test_cpu_tensors_get_native_code_where_it_is():
    want = "rode_kernels.backends.cpu" if backends()["cpu"].available else "rode_kernels.backends.reference"
    assert select_backend("", torch.zeros(2, 4), 5, make_mixture((2,), (1.0,))).__name__ == want


WITHOUT_NATIVE = """
import sys
sys.modules["rode_kernels._native"] = None  # what a pure-Python install lacks
import torch, rode_kernels
x, A, B, W = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2), torch.randn(1, 4)
for _ in range(2):
    y = rode_kernels.rectified_mixture(x, A, B, W, ranks=(2,), scaling=(1.0,))
want = torch.relu(x @ W.T) * (x @ A.T @ B.T)
assert torch.allclose(y, want, atol=1e-5)
print(rode_kernels.backends()["cpu"].available)
"""


def test_without_native_code_it_works_and_says_so_once():
    result = run(WITHOUT_NATIVE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False"
    assert result.stderr.count("using the slower 'reference' backend") == 1


def test_an_instruction_set_that_does_not_exist_is_named():
    code = "import rode_kernels; print(rode_kernels.backends()['cpu'].reason)"
    if backends()["cpu"].available:
        assert "expected one of" in run(code, RODE_CPU_ISA="sse9").stdout


def test_an_instruction_set_chosen_before_the_first_call_stays():
    code = """
import rode_kernels
from rode_kernels import _native
_native.set_isa("generic")
print(rode_kernels.backends()["cpu"].reason, _native.isa())
"""
    if backends()["cpu"].available:
        said = run(code, RODE_CPU_ISA="").stdout
        assert "with generic instructions" in said
        assert said.split()[-1] == "generic"


def test_command_prints_every_backend():
    result = subprocess.run(
        [sys.executable, "-m", "rode_kernels"], capture_output=True, text=True, check=True
    )
    for name in backends():
        assert name in result.stdout
        assert backends()[name].reason in result.stdout


def test_meta_tensors_pass_through():
    """Shapes can be worked out without data: models are built on the meta device."""
    m = lambda *shape: torch.empty(*shape, device="meta")  # noqa: E731
    y, g = rectified_mixture(
        m(2, 3, 8), m(6, 8), m(5, 6), m(2, 8), ranks=(2, 4), scaling=(1.0, 1.0), return_gates=True
    )
    assert y.shape == (2, 3, 5)
    assert g.shape == (2, 3, 2)
    assert y.device.type == "meta"
