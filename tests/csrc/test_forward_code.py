"""nvcc's code for the forward kernels: no warning, no spill, as many blocks at once as their comment claims, tensor-core
instructions, and 16-byte copies."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import torch

from mixture_oracle import random_problem
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.cuda.emulated import machine, native
from rode_kernels.backends.gpu.plans import Plan
from rode_kernels.siblings import mixtures_forward
from sass import LONG_CASES, NVCC, ROOT, SHARED_KIB, compile_kernels, cuobjdump
from sibling_problems import random_siblings, siblings_of, with_dropout

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
KERNELS = {
    *("forward_fused 4 1", "forward_fused 8 2", "forward_shrink 16 5", "forward_shrink 64 5"),
    *("forward_shrink 64 16", "forward_shrink 64 5 own", "forward_shrink 64 16 own", "forward_expand 16 one"),
    *("forward_expand 64 one", "forward_expand 64 kept", "forward_expand 64 again"),
}


def claims() -> dict[str, tuple[int, int]]:
    """From the comment in forward.cuh: blocks at once on a multiprocessor with much shared memory, and with little."""
    text = (ROOT / "csrc/cuda/forward.cuh").read_text()
    return {
        name: (int(large), int(small))
        for name, large, small in re.findall(
            r"^//   (forward_\w+(?: \w+)+): (\d+), (\d+)$", text, re.MULTILINE
        )
    }


def shared_bytes(kind: str) -> dict[str, int]:
    """What each kernel asks for, by running it; nothing where the emulator was not built."""
    if not backends()["cuda-emulated"].available:
        return {}
    dtype = {"bf16": torch.bfloat16, "f16": torch.half, "float": torch.float32}[kind]
    cases = {
        ("forward_fused 4 1",): (Plan(True, 64, 1, 1), (2, 4, 8, 16)),
        ("forward_fused 8 2",): (Plan(True, 64, 1, 1), (16, 16, 16, 16)),
        ("forward_shrink 16 5", "forward_expand 16 one"): (Plan(False, 16, 1, 1), (2, 4, 8, 16)),
        ("forward_shrink 64 5", "forward_expand 64 one"): (Plan(False, 64, 1, 1), (2, 4, 8, 16)),
        ("forward_shrink 64 16", "forward_expand 64 kept"): (Plan(False, 64, 1, 1, True), (32, 32, 32, 32)),
        ("forward_shrink 64 16", "forward_expand 64 again"): (Plan(False, 64, 1, 1), (256, 256, 256, 256)),
    }
    found = {}
    for names, (plan, ranks) in cases.items():
        p = random_problem((5,), ranks=ranks, dtype=dtype)
        machine.plan = plan
        try:
            rectified_mixture(
                *(p.x, p.A, p.B, p.router_weight),
                ranks=ranks,
                scaling=p.scaling,
                base=p.base,
                backend="cuda-emulated",
            )
        finally:
            machine.plan = None
        for name, launch in zip(names, native.launches(), strict=True):
            assert name.startswith(launch["kernel"])
            found[name] = launch["shared_bytes"]
    for ranks, name in (((8,), "forward_shrink 64 5 own"), ((2, 4, 8, 16), "forward_shrink 64 16 own")):
        problems = with_dropout(random_siblings((5,), ranks=(ranks, ranks), dtype=dtype), 0.1, [1, 2])
        siblings = siblings_of(problems)
        with patch.object(machine, "together", True):
            mixtures_forward(problems[0].x, siblings, [None, None], dropout_p=0.1, backend="cuda-emulated")
        (launch,) = (one for one in native.launches() if one["kernel"] == "forward_shrink")
        found[name] = launch["shared_bytes"]
    assert set(found) == KERNELS
    return found


def check(kind: str, arch: int, folder, shared: dict[str, int]) -> None:
    report, kernels = compile_kernels("forward.cu", kind, arch, folder)
    assert "warning" not in report
    assert set(kernels) == KERNELS | {f"{name} any" for name in KERNELS}
    claimed = claims()
    assert set(claimed) == KERNELS
    for name, kernel in kernels.items():
        where = f"{name} for {kind} on sm_{arch}"
        assert kernel.spills == 0, where
        assert kernel.stack == 0, where
        if name in shared:
            assert shared[name] <= 99 * 1024, f"{where}: more shared memory than every device gives a block"
            blocks = kernel.blocks(arch, shared[name])
            assert blocks >= claimed[name][0 if SHARED_KIB[arch] > 100 else 1], (
                f"{where}: {blocks} blocks at once"
            )
        if not cuobjdump():
            continue
        assert kernel.count(r"LDL|STL") == 0, f"{where}: local memory"
        assert kernel.count(r"(LD|ST)(\.|$)") == 0, f"{where}: generic addresses"
        product = {
            "bf16": r"HMMA\.16816\.F32\.BF16",
            "f16": r"HMMA\.16816\.F32",
            "float": r"HMMA\.1688\.F32\.TF32",
        }
        assert kernel.count(product[kind]) >= 8, f"{where}: tensor cores"
        assert kernel.count(r"LDSM\.16\.M(T)?88\.[24]|LDSM") >= 2, f"{where}: ldmatrix"
        assert kernel.count(r"LDGSTS.*\.128") >= 3, f"{where}: asynchronous copies of 16 bytes"
        if name in KERNELS and name.startswith(("forward_fused", "forward_expand 64")):
            assert kernel.count(r"STG.*\.128") >= 2, f"{where}: stores of 16 bytes"


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
