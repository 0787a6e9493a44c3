"""What stands in for a device: nvcc takes the device header without a warning, and kernels keep to that header."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sass import cuobjdump, disassembly

ROOT = Path(__file__).parent.parent.parent
HEADER = ROOT / "csrc/cuda/ptx.cuh"
NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_compiles_every_primitive_without_warning_or_spill(arch, tmp_path):
    command = [NVCC, "-std=c++20", f"-arch={arch}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"]
    source = ROOT / "tests/csrc/kernels.cu"
    run = subprocess.run(
        [*command, "-o", str(tmp_path / "kernels.cubin"), str(source)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = run.stdout + run.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) == 19
    assert set(spills) == {("0", "0", "0")}


@pytest.mark.skipif(NVCC is None or cuobjdump() is None, reason="needs nvcc and cuobjdump")
@pytest.mark.parametrize("arch", [80, 90])
def test_a_predicated_load_stays_behind_the_barrier_of_its_round(arch, tmp_path):
    """Its address does not change: without volatile and a clobber nvcc 13.0 loads once, before the loop."""
    cubin = tmp_path / "kernels.cubin"
    command = [NVCC, "-std=c++20", f"-arch=sm_{arch}", "-cubin", "-o", str(cubin), "tests/csrc/kernels.cu"]
    subprocess.run(command, cwd=ROOT, check=True)
    code = disassembly(cubin).split("other_warp_rounds")[1].split("Function :")[0]
    lines = re.findall(r"/\*([0-9a-f]{4})\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", code)
    places = {name: [int(at, 16) for at, of, _ in lines if of.startswith(name)] for name in ("LDG", "BAR")}
    back = [
        (int(to, 16), int(at, 16))
        for at, name, rest in lines
        if name == "BRA"
        for to in [rest.split("0x")[1]]
    ]
    loops = [
        (first, last)
        for first, last in back
        if first < last and any(first <= at < last for at in places["BAR"])
    ]
    assert len(places["LDG"]) == len(loops) == 1
    assert loops[0][0] <= places["LDG"][0] < min(places["BAR"])


# Anything else that reaches memory or other threads would escape the emulator's eyes.
FORBIDDEN = (
    r"\basm\b|__shared__|__device__|__global__|\b(threadIdx|blockIdx|blockDim|gridDim)\b|__sync|__shfl|__ballot|__ldg|"
    r"\batomic[A-Z]|\bcuda[A-Z]|reinterpret_cast|const_cast|\.address\b|\.buffer\b|\.(template )?at<|<<<"
)


def test_kernels_keep_to_the_header():
    kernels = [*(ROOT / "csrc/cuda").glob("*.cuh"), *(ROOT / "tests/csrc").glob("*.cu*")]
    kernels = [path for path in kernels if path not in (HEADER, HEADER.with_name("types.cuh"))]
    assert ROOT / "csrc/cuda/forward.cuh" in kernels
    assert ROOT / "tests/csrc/kernels.cuh" in kernels
    for path in kernels:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            code = line.split("//")[0]
            assert not re.search(FORBIDDEN, code), f"{path.relative_to(ROOT)}:{number}: {line}"


def test_host_code_holds_no_kernels():
    for path in (ROOT / "csrc/cuda").glob("*.cu"):
        assert not re.search(r"RODE_KERNEL|RODE_DEVICE|__global__|__device__", path.read_text()), path
