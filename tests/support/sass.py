"""nvcc's code for the kernels, read from its report and from the machine code.

`python tests/support/sass.py backward.cu bf16 80` prints the loops of every kernel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
NVCC = shutil.which("nvcc")
TYPES = {"bf16": "rode::gpu::bf16", "f16": "rode::gpu::f16", "float": "float"}
ARCHS = (80, 86, 89, 90, 100, 120)
# The long tests compile these; the quick ones have the first architecture. Code of float16 differs from that of bfloat16 only in
# the type of a product.
LONG_CASES = (("bf16", ARCHS[1:]), ("float", ARCHS[1:]), ("f16", ARCHS[:1]))

# A multiprocessor's registers are 64 Ki everywhere; its shared memory, KiB, of which each block takes 1 more than it asks for.
SHARED_KIB = {80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}


@lru_cache
def cuobjdump() -> str | None:
    """The disassembler: on PATH, or in Triton's wheel."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations if spec else []:
        path = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if path.is_file():
            return str(path)
    return None


@dataclass
class Kernel:
    """A kernel for one architecture: its name with the template's numbers, resources, and how often each instruction occurs."""

    name: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    instructions: Counter = field(default_factory=Counter)
    code: list[tuple[int, str, str]] = field(default_factory=list)  # address, instruction, operands

    def loops(self) -> list[tuple[int, int, Counter]]:
        """First and last address of every loop, and how often each instruction occurs in it, inner loops included."""
        found = []
        for last, name, operands in self.code:
            if name == "BRA" and (to := re.search(r"0x([0-9a-f]+)", operands)) and int(to[1], 16) < last:
                first = int(to[1], 16)
                found.append((first, last, Counter(n for at, n, _ in self.code if first <= at <= last)))
        return sorted(found, key=lambda loop: loop[:2])

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.match(pattern, name))

    def blocks(self, arch: int, shared_bytes: int, threads: int = 128) -> int:
        """Blocks that fit on a multiprocessor at once; registers are given out by 8 a thread."""
        registers = 65536 // (-(-self.registers // 8) * 8 * threads)
        return min(registers, SHARED_KIB[arch] * 1024 // (shared_bytes + 1024))


def _short(mangled: str) -> str:
    """forward_fused 4 1, from a mangled name; after it " own" for mixtures with masks of their own, and " any" where rows need not
    be aligned (the last of its flags is false)."""
    name = re.search(r"gpu\d+([a-z_]+)I", mangled).group(1)
    passes = [("one", "kept", "again")[int(i)] for i in re.findall(r"PassesE(\d)E", mangled)]
    own = ["own"] if "MasksE1E" in mangled else []
    flags = re.findall(r"Lb([01])E", mangled)
    return " ".join(
        [name, *re.findall(r"Li(\d+)E", mangled), *passes, *own, *(["any"] if flags[-1:] == ["0"] else [])]
    )


def compile_kernels(source: str, kind: str, arch: int, folder: Path) -> tuple[str, dict[str, Kernel]]:
    """nvcc's output for csrc/cuda/`source`, and the kernels in it by short name; warnings are errors."""
    cubin = folder / f"{source}-{kind}-{arch}.cubin"
    run = subprocess.run(
        [
            *(NVCC, "-std=c++20", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin"),
            *(f"-DRODE_TYPE={TYPES[kind]}", "-o", str(cubin), f"csrc/cuda/{source}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    kernels = {}
    pattern = (
        r"entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    for mangled, stack, stores, loads, registers in re.findall(pattern, report, re.DOTALL):
        kernel = Kernel(_short(mangled), int(registers), int(stack), int(stores) + int(loads))
        kernels[kernel.name] = kernel
    if cuobjdump():
        _read_instructions(cubin, kernels)
    return report, kernels


def disassembly(cubin: Path) -> str:
    """The machine code of a cubin's kernels, as cuobjdump prints it."""
    tool = cuobjdump()
    assert tool is not None
    path = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}  # it calls nvdisasm, which stands beside it
    run = subprocess.run([tool, "-sass", str(cubin)], env=path, check=True, capture_output=True, text=True)
    return run.stdout


def _read_instructions(cubin: Path, kernels: dict[str, Kernel]) -> None:
    current = None
    pattern = re.compile(r"/\*([0-9a-f]{4,6})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)([^;]*)")
    for line in disassembly(cubin).splitlines():
        if function := re.search(r"Function : (\S+)", line):
            current = kernels[_short(function.group(1))]
        elif (found := pattern.search(line)) and current is not None:
            current.instructions[found.group(2)] += 1
            current.code.append((int(found.group(1), 16), found.group(2), found.group(3)))


def main(source: str, kind: str, arch: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _, kernels = compile_kernels(source, kind, int(arch), Path(folder))
    for name, kernel in sorted(kernels.items()):
        print(
            f"{name}: {kernel.registers} registers, {kernel.spills} bytes spilled, {kernel.count('(?!NOP)')} instructions"
        )
        for first, last, found in kernel.loops():
            of = {
                what: sum(n for i, n in found.items() if i.startswith(what))
                for what in ("IMAD.WIDE", "HMMA", "LDS")
            }
            text = ", ".join(f"{n} {what}" for what, n in of.items())
            print(f"  loop {first:x} to {last:x}: {sum(found.values())} instructions: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
