"""nvcc's code for the kernels between PyTorch's products: no warning, no spill, blocks at once as their comment says."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from mixture_oracle import operation, random_problem
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.cuda.emulated import machine, native
from sass import LONG_CASES, NVCC, ROOT, SHARED_KIB, compile_kernels, cuobjdump

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
KERNELS = {"pack_parameters", "drop_rows", "apply_gates", "apply_gates_backward"}


def shared_bytes(kind: str) -> dict[str, int]:
    """What each kernel asks for with 16 experts of rank 16, by running it; nothing where the emulator was not built."""
    if not backends()["cuda-emulated"].available:
        return {}
    dtype = {"bf16": torch.bfloat16, "f16": torch.half, "float": torch.float32}[kind]
    p, found = random_problem((5,), ranks=(16,) * 16, dtype=dtype), {}
    machine.gemm_path = True
    try:
        # of both passes the emulator shows the last one's launches
        for run in (cuda_emulated_forward, partial(cuda_emulated_forward, dropout_p=0.5, seed=1), operation):
            run(p, backend="cuda-emulated")
            found |= {launch["kernel"]: launch["shared_bytes"] for launch in native.launches()}
    finally:
        machine.gemm_path = None
    assert set(found) == KERNELS
    return found


def cuda_emulated_forward(p, **options) -> None:
    rectified_mixture(p.x, p.A, p.B, p.router_weight, ranks=p.ranks, scaling=p.scaling, **options)


def claims() -> dict[str, tuple[int, int]]:
    """From the comment in gates.cuh, as forward's."""
    text = (ROOT / "csrc/cuda/gates.cuh").read_text()
    lines = re.findall(r"^//   (\w+): (\d+), (\d+)$", text, re.MULTILINE)
    return {name: (int(large), int(small)) for name, large, small in lines}


def check(kind: str, arch: int, folder, shared: dict[str, int]) -> None:
    report, kernels = compile_kernels("gates.cu", kind, arch, folder)
    assert "warning" not in report
    assert set(kernels) == KERNELS | {"drop_rows any"}
    assert set(claims()) == KERNELS
    for name, kernel in kernels.items():
        where = f"{name} for {kind} on sm_{arch}"
        assert kernel.spills == 0, where
        assert kernel.stack == 0, where
        if name in shared:
            blocks = kernel.blocks(arch, shared[name])
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
    check(kind, 80, tmp_path, shared_bytes(kind))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "archs"), LONG_CASES)
def test_code_for_every_architecture(kind, archs, tmp_path):
    assert cuobjdump(), "needs cuobjdump: on PATH, or in Triton's wheel"
    shared = shared_bytes(kind)  # not in the threads: there is one emulator
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda arch: check(kind, arch, tmp_path, shared), archs))
