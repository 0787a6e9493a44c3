"""What Triton makes of its kernels for GPUs that are not here: registers, spills, shared memory, matrix instructions.

Compilation needs the interpreter off, which `make test` has on: another process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict

import pytest

from sass import ROOT, cuobjdump

pytest.importorskip("triton")

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
SHARED_KIB = dict(zip(TARGETS, (163, 99, 227, 227, 99, 64, 64), strict=True))  # that a block can have
needs_cuobjdump = pytest.mark.skipif(
    cuobjdump() is None, reason="needs cuobjdump, as Triton's Linux wheel has it"
)


def compiled(program: list[str]) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    run = subprocess.run(
        [sys.executable, *program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def spills_allowed(report: dict) -> int:
    """A handful that ptxas takes by itself, far from the last register, so that more programs fit a multiprocessor. Any number in a
    case of no real size, and where dropout meets rows that 4 does not divide, which is slow."""
    if report["case"] in ("ones", "dropout on ragged rows"):
        return 1 << 30
    return 8 if report["registers"] < 128 else 0


def check_code(kind: str, targets: tuple[str, ...]) -> None:
    kernels = defaultdict(set)
    for report in compiled(["tests/support/triton_code.py", kind, "calls", *targets]):
        where = f"{report['kernel']} ({report['case']}) for {kind} on {report['target']}: {report}"
        kernels[report["target"]].add(report["kernel"])
        assert report["spills"] <= spills_allowed(report), where
        assert report["shared"] <= SHARED_KIB[report["target"]] * 1024, where
        assert report["registers"] <= (512 if report["target"] == "gfx942" else 256), where
        if (
            kind != "float"
        ):  # every product of 16-bit values; float32 without tf32 has no matrix instruction on most of them
            assert report["left"] == report["left_fp32"] == 0, where
            assert report["matrix"] >= report["narrow_dots"], where
        else:
            assert report["narrow_dots"] == 0, where
    everything = {
        "fused",
        "shrink",
        "expand",
        "grad_output_pass",
        "gate_backward",
        "grad_input_pass",
        "reduce_partials",
    }
    everything |= {"apply_gates", "apply_gates_backward"}
    assert kernels == dict.fromkeys(targets, everything)


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets"),
    [("bf16", ("sm_90", "gfx942")), ("float", ("sm_89",))],
)
def test_code_for_gpus(kind, targets):
    """float16's code differs from bfloat16's only in the type of a product; CONTRIBUTING.md has the command for it."""
    check_code(kind, targets)


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "targets"), [("bf16", ("sm_89",))])
def test_code_of_every_configuration(kind, targets):
    """All that tuning may choose compiles and fits; a few spills are weighed by its measurement."""
    reports = compiled(["tests/support/triton_code.py", kind, "choices", *targets])
    assert {r["kernel"] for r in reports} >= {
        "fused",
        "shrink",
        "expand",
        "grad_output_pass",
        "grad_input_pass",
    }
    for report in reports:
        assert report["spills"] <= 16, report
        assert report["shared"] <= SHARED_KIB[report["target"]] * 1024, report
