"""The roofline: what follows from it, and that it is measured where it can be."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import torch

from benchmarks import peak
from benchmarks.peak import Peak
from benchmarks.work import Work

ROUND = Peak("by hand", {"float32": 100.0, "bfloat16": 200.0, "float16": 100.0}, read=10.0, copy=8.0)


def test_the_floor_is_the_slower_of_two():
    assert ROUND.floor(Work(operations=1000.0, bytes=50.0), torch.float32) == (10.0, "compute")
    assert ROUND.floor(Work(operations=1000.0, bytes=50.0), torch.bfloat16) == (5.0, "memory")
    assert ROUND.floor(Work(operations=0.0, bytes=80.0), torch.float16) == (8.0, "memory")


def test_without_a_compiler_it_is_not_known(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert peak.compiler() is None
    assert peak.measure("cpu") is None


def test_a_compiler_may_be_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert peak.compiler() == "/bin/g++"
    monkeypatch.setenv("CXX", "mine")
    assert peak.compiler() == "/bin/mine"


needs_compiler = pytest.mark.skipif(peak.compiler() is None, reason="no C++ compiler")


@needs_compiler
def test_measured_here(monkeypatch):
    monkeypatch.setattr(peak, "REPEATS", 2)
    monkeypatch.setattr(peak, "SECONDS", 0.0)
    found = peak.measure("cpu")
    assert set(found.operations) == {"float32", "bfloat16", "float16"}
    assert found.operations["float16"] == found.operations["float32"] > 0
    assert found.operations["bfloat16"] > 0  # where these few rounds are disturbed, even below float32's
    assert found.read > 0
    assert found.copy > 0
    assert found.json()["how"] == found.how
    assert "Gflop/s float32" in str(found)


@needs_compiler
def test_sums_stay_in_registers(tmp_path):
    """Of an inner loop that loads or stores, the rate would be memory's."""
    out = tmp_path / "peak.s"
    command = [peak.compiler(), "-std=c++17", "-O3", "-march=native", "-S", str(peak.SOURCE), "-o", str(out)]
    subprocess.run(command, check=True)
    text = out.read_text()
    if "vfmadd" not in text:
        pytest.skip("a processor without fused multiply-adds of x86")
    products = [line for line in text.splitlines() if "vfmadd" in line or "vdpbf16ps" in line]
    assert len(products) >= 12
    assert not any("(" in line for line in products)


def test_on_a_device_products_and_copies_count():
    found = peak._of_products("cpu", width=32, size=4096)
    assert set(found.operations) == {"float32", "bfloat16", "float16"}
    assert min(found.operations.values()) > 0
    assert found.read == found.copy > 0
