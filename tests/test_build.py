"""`pip install .` in ordinary build isolation: both packages, native code where a compiler is, and no torch in the build."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.slow


def build(tmp_path: Path, **env: str) -> tuple[Path, str]:
    """A wheel from a copy of the tracked tree, and the build's log."""
    copy = tmp_path / "tree"
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path / "dist"), "."],
        cwd=copy,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (wheel,) = (tmp_path / "dist").glob("rode-*.whl")
    return wheel, run.stdout + run.stderr


def test_wheel_holds_both_packages_and_native_code(tmp_path):
    wheel, log = build(tmp_path, RODE_NATIVE="on")
    names = zipfile.ZipFile(wheel).namelist()
    sources = subprocess.run(
        ["git", "ls-files", "python/rode", "rode_kernels"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    missing = {s.removeprefix("python/") for s in sources} - set(names)
    assert not missing, "tracked, but not in the wheel"
    assert any(n.startswith("rode_kernels/_native") for n in names)
    assert log.count("this version has no GPU kernels; CPU core only") == 1
    assert "Collecting torch" not in log


@pytest.mark.parametrize(
    "why", [{"RODE_NATIVE": "off"}, {"CXX": "/no/such/compiler"}], ids=["off", "no compiler"]
)
def test_pure_python_wheel_works_on_reference(tmp_path, why):
    wheel, log = build(tmp_path, **why)
    assert "pure-Python install, calls run on the slower 'reference' backend" in log
    assert "none-any" in wheel.name
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = """
import sys, torch
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]  # this environment's own install
import rode_kernels
assert rode_kernels.__file__.startswith(sys.argv[1]), rode_kernels.__file__
assert not rode_kernels.backends()["cpu"].available
x, A, B, W = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2), torch.randn(1, 4)
y = rode_kernels.rectified_mixture(x, A, B, W, ranks=(2,), scaling=(1.0,))
assert torch.allclose(y, torch.relu(x @ W.T) * (x @ A.T @ B.T), atol=1e-5)
"""
    env = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "reference" in run.stderr
