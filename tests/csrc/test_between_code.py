"""What nvcc makes of the kernels between library products: no warning, no spill, as many blocks at once as their comment claims."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from sass import ARCHS, NVCC, ROOT, SHARED_KIB, TYPES, compile_kernels, cuobjdump

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
# Of 16 experts of rank 16: gates of 8 tokens, and their products (`backward_weigh_bytes`).
SHARED = {"pack_parameters": 0, "forward_weigh": 8 * 16 * 4, "backward_weigh": 8 * (16 + 256 + 17) * 4}


def claims() -> dict[str, tuple[int, int]]:
    """From the comment in between.cuh, as forward's."""
    text = (ROOT / "csrc/cuda/between.cuh").read_text()
    lines = re.findall(r"^//   (\w+): (\d+), (\d+)$", text, re.MULTILINE)
    return {name: (int(large), int(small)) for name, large, small in lines}


def check(kind: str, arch: int, folder) -> None:
    report, kernels = compile_kernels("between.cu", kind, arch, folder)
    assert "warning" not in report
    assert set(kernels) == set(claims()) == set(SHARED)
    for name, kernel in kernels.items():
        where = f"{name} for {kind} on sm_{arch}"
        assert kernel.spills == 0, where
        assert kernel.stack == 0, where
        blocks = kernel.blocks(arch, SHARED[name])
        assert blocks >= claims()[name][0 if SHARED_KIB[arch] > 100 else 1], f"{where}: {blocks} blocks"
        if not cuobjdump():
            continue
        assert kernel.count(r"LDL|STL") == 0, f"{where}: local memory"
        assert kernel.count(r"(LD|ST)(\.|$)") == 0, f"{where}: generic addresses"
        assert kernel.count(r"(ATOM|RED)(\.|G|$)") == 0, f"{where}: atomics"
        if name == "pack_parameters":
            assert kernel.count(r"STG.*\.128") > 0, f"{where}: stores of 16 bytes"


@pytest.mark.parametrize("kind", ["bf16", "float"])
def test_code_for_one_architecture(kind, tmp_path):
    check(kind, 80, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TYPES)
def test_code_for_every_architecture(kind, tmp_path):
    assert cuobjdump(), "needs cuobjdump: on PATH, or in Triton's wheel"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda arch: check(kind, arch, tmp_path), ARCHS))
