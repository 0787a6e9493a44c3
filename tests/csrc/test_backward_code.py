"""nvcc's code for the backward kernels: no warning, no spill, as many blocks at once as their comment claims, tensor-core
instructions, transposed loads and 16-byte copies."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from unittest.mock import patch

import pytest
import torch

from mixture_oracle import random_problem
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.cuda.emulated import machine, native
from sass import LONG_CASES, NVCC, ROOT, SHARED_KIB, compile_kernels, cuobjdump
from sibling_problems import random_siblings, run, with_dropout

pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc")
THREADS = {"grad_output_pass": 256}


def claims() -> dict[str, tuple[int, int]]:
    """From the comment in backward_params.cuh, as forward's."""
    text = (ROOT / "csrc/cuda/backward_params.cuh").read_text()
    lines = re.findall(r"^//   (\w+(?: \d+)*(?: own)?): (\d+), (\d+)$", text, re.MULTILINE)
    return {name: (int(large), int(small)) for name, large, small in lines}


def shared_bytes(kind: str) -> dict[str, int]:
    """What each kernel asks for, by running it; nothing where the emulator was not built."""
    if not backends()["cuda-emulated"].available:
        return {}
    dtype = {"bf16": torch.bfloat16, "f16": torch.half, "float": torch.float32}[kind]
    found = {}
    for ranks, numbers in (((2, 4, 8, 16), (4, 3)), ((16,) * 4, (8, 5)), ((16,) * 8, (8, 4))):
        p = random_problem((5,), ranks=ranks, dtype=dtype)
        leaves = [t.detach().requires_grad_() for t in (p.x, p.A, p.B, p.router_weight)]
        y = rectified_mixture(*leaves, ranks=ranks, scaling=p.scaling, backend="cuda-emulated")
        torch.autograd.grad(y, leaves, p.dy)
        names = [
            f"grad_output_pass {numbers[0]}",
            "gate_backward",
            f"grad_input_pass {numbers[1]}",
            "reduce_partials",
        ]
        for name, launch in zip(names, native.launches(), strict=True):
            assert name.startswith(launch["kernel"])
            assert launch["threads"] == THREADS.get(launch["kernel"], 128)
            found[name] = launch["shared_bytes"]
    for ranks, name in (((8,), "grad_input_pass 5 own"), ((2, 4, 8, 16), "grad_input_pass 4 own")):
        problems = with_dropout(random_siblings((5,), ranks=(ranks, ranks), dtype=dtype), 0.1, [1, 2])
        with patch.multiple(machine, together=True, architecture=90):
            run(problems, "cuda-emulated")
        (launch,) = (one for one in native.launches() if one["kernel"] == "grad_input_pass")
        found[name] = launch["shared_bytes"]
    return found


def check(kind: str, arch: int, folder, shared: dict[str, int]) -> None:
    report, kernels = compile_kernels("backward.cu", kind, arch, folder)
    assert "warning" not in report
    claimed = claims()
    of_alignment = {name for name in claimed if name.startswith(("grad_output_pass", "grad_input_pass"))}
    assert set(kernels) == set(claimed) | {f"{name} any" for name in of_alignment}
    for name, kernel in kernels.items():
        where = f"{name} for {kind} on sm_{arch}"
        assert kernel.spills == 0, where
        assert kernel.stack == 0, where
        if name in shared:
            if name != "grad_input_pass 5 own":  # which has another one in its place where it does not fit
                assert shared[name] <= 99 * 1024, (
                    f"{where}: more shared memory than every device gives a block"
                )
            blocks = kernel.blocks(arch, shared[name], THREADS.get(name.split()[0], 128))
            assert blocks >= claimed[name][0 if SHARED_KIB[arch] > 100 else 1], (
                f"{where}: {blocks} blocks at once"
            )
        if not cuobjdump():
            continue
        assert kernel.count(r"LDL|STL") == 0, f"{where}: local memory"
        assert kernel.count(r"(LD|ST)(\.|$)") == 0, f"{where}: generic addresses"
        assert kernel.count(r"(ATOM|RED)(\.|G|$)") == 0, f"{where}: atomics"
        if name == "gate_backward":
            assert kernel.count(r"LDG.*\.128") > 0, f"{where}: loads of 16 bytes"
        if name.split()[0] not in ("grad_output_pass", "grad_input_pass"):
            continue
        product = {
            "bf16": r"HMMA\.16816\.F32\.BF16",
            "f16": r"HMMA\.16816\.F32",
            "float": r"HMMA\.1688\.F32\.TF32",
        }
        assert kernel.count(product[kind]) >= 16, f"{where}: tensor cores"
        assert kernel.count(r"FFMA") <= 64, f"{where}: products left to ordinary instructions"
        assert kernel.count(r"LDSM\.16\.M88") >= 1, f"{where}: ldmatrix"
        assert kind == "float" or kernel.count(r"LDSM\.16\.MT88") >= 2, f"{where}: transposed ldmatrix"
        assert kernel.count(r"LDGSTS.*\.128") >= 1, f"{where}: asynchronous copies of 16 bytes"
        if name.startswith("grad_input_pass") and name in claimed:
            # of dropout's mask, four counters at a time with 19 wide products each: docs/cuda/dropout.md
            masks = [sum(c.values()) for _, _, c in kernel.loops() if c["IMAD.WIDE.U32"] >= 4 * 19]
            assert min(masks) <= 250, f"{where}: {min(masks)} instructions for the bits of 16 elements"
            assert kernel.count(r"STG.*\.128") >= 2, f"{where}: wide stores of dx"


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
