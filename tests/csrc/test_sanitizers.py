"""The CPU core without Python: random problems against float64, under sanitizers and on aarch64."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ON_X86 = platform.machine() in ("x86_64", "AMD64")
SANITIZERS = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def found(least: int, *names: str) -> str | None:
    """A compiler's path, of this version or newer."""
    for path in filter(None, map(shutil.which, names)):
        version = subprocess.run([path, "-dumpversion"], capture_output=True, text=True).stdout
        if version and int(version.split(".")[0]) >= least:
            return path
    return None


# Each sees what the other does not: Clang arithmetic on null pointers, for one.
COMPILERS = {
    "g++": found(12, "g++"),
    "clang++": found(15, "clang++", *(f"clang++-{version}" for version in range(25, 14, -1))),
}
CROSS, QEMU = found(12, "aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")


def instruction_sets(x86: bool) -> dict[str, list[str]]:
    """Compiler options of each, as CMakeLists.txt has them."""
    options: dict[str, list[str]] = {"generic": []}
    for name, value in re.findall(r"set\(flags_(\w+) (.+)\)", (ROOT / "CMakeLists.txt").read_text()):
        if x86:
            options[name] = value.replace("${flags_avx512}", " ".join(options.get("avx512", []))).split()
    return options


ISAS = list(instruction_sets(ON_X86))


def check_call(command: list[str], **env: str) -> str:
    run = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 0, f"{' '.join(command)}\n{run.stdout[-3000:]}{run.stderr[:6000]}"
    return run.stdout


def build(folder: Path, compiler: str, *options: str, x86: bool) -> Path:
    """random_problems with the core's sources, two compilers at a time."""
    core, command = ROOT / "csrc/cpu", [compiler, "-std=c++20", "-fopenmp", *options]
    jobs = {
        f"{source}_{isa}": [f"-DRODE_ISA={isa}", "-ffp-contract=fast", *flags, str(core / f"{source}.cpp")]
        for isa, flags in reversed(instruction_sets(x86).items())  # what takes longest first
        for source in ("backward", "forward")
    }
    jobs["dispatch"] = [*(["-DRODE_X86"] if x86 else []), str(core / "dispatch.cpp")]
    renamed = (f"-D{name}_scratch={name}_kept_scratch" for name in ("take", "give_back"))
    jobs["scratch"] = [*renamed, str(core / "scratch.cpp")]
    jobs["random_problems"] = ["-O1", str(ROOT / "tests/csrc/random_problems.cpp")]

    def compile_object(job: tuple[str, list[str]]) -> str:
        target = str(folder / f"{job[0]}.o")
        check_call([*command, *job[1], "-c", "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_object, jobs.items()))
    check_call([*command, *objects, "-o", str(folder / "random_problems")])
    return folder / "random_problems"


def needs(compiler: str) -> str:
    """Its path; the test is skipped where it or its sanitizers are missing."""
    path = COMPILERS[compiler]
    probe = [path, "-fopenmp", *SANITIZERS, "-x", "c++", "-", "-o", os.devnull]
    if path is None or subprocess.run(probe, input=b"int main() {}", capture_output=True).returncode:
        pytest.skip(f"needs {compiler} with OpenMP and sanitizers (Debian: g++; clang-15 and libomp-15-dev)")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_random_problems_are_right_and_nothing_is_read_out_of_bounds_or_too_late(compiler, tmp_path):
    trial = build(tmp_path, needs(compiler), *SANITIZERS, x86=ON_X86)
    # GCC misplaces vectors of 64 bytes on the stack that is kept to see who reads it after a return.
    large = [isa for isa in ISAS if isa.startswith("avx512") and compiler == "g++"]
    others = [isa for isa in ISAS if isa not in large]

    def run(isas: list[str]) -> str:
        # what malloc gives is NaN until it is written
        options = f"detect_stack_use_after_return={int(isas is others)}:malloc_fill_byte=255:max_malloc_fill_size={1 << 30}"
        env = {"ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
        return check_call([str(trial), "0", "100", *isas], **env)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(run, filter(None, [others, large])))
    assert said[0].startswith("100 problems are right on generic")


@pytest.mark.slow
@pytest.mark.skipif(
    CROSS is None or QEMU is None, reason="needs Debian's g++-aarch64-linux-gnu and qemu-user"
)
def test_random_problems_are_right_on_aarch64(tmp_path):
    trial = build(tmp_path, CROSS, "-O3", "-static", x86=False)
    assert check_call([QEMU, str(trial), "0", "100", "generic"]) == "100 problems are right on generic\n"


@pytest.mark.parametrize("compiler", [*COMPILERS, "aarch64-linux-gnu-g++"])
def test_the_core_compiles(compiler):
    path, x86 = (CROSS, False) if compiler.startswith("aarch64") else (COMPILERS[compiler], ON_X86)
    if path is None:
        pytest.skip(
            f"needs {compiler}, GCC 12 or Clang 15 or newer (Debian: g++, clang-15, g++-aarch64-linux-gnu)"
        )
    isa, flags = list(instruction_sets(x86).items())[-1]
    options = [f"-DRODE_ISA={isa}", *flags, *(["-DRODE_X86"] if x86 else [])]
    sources = [str(ROOT / f"csrc/cpu/{name}.cpp") for name in ("dispatch", "scratch", "forward", "backward")]
    check_call([path, "-std=c++20", "-fsyntax-only", *options, *sources])
