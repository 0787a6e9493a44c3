"""Native code under sanitizers and on aarch64: the CPU core without Python on random problems, and the emulator's tests."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ON_X86 = platform.machine() in ("x86_64", "AMD64")


def tool(name: str) -> str | None:
    """Its path, in this environment or on PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


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
    return run.stdout + run.stderr


def build(folder: Path, compiler: str, *options: str, target: str = "random_problems") -> Path:
    """The folder with what CMake built of `target`."""
    cmake, ninja = tool("cmake"), tool("ninja")
    if cmake is None or ninja is None:
        pytest.skip("needs cmake and ninja")
    configure = [cmake, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-S", str(ROOT), "-B", str(folder)]
    check_call([*configure, f"-DCMAKE_CXX_COMPILER={compiler}", *options], CXXFLAGS="", LDFLAGS="")
    check_call([cmake, "--build", str(folder), "--parallel", "2", "--target", *target.split()])
    return folder


def needs(compiler: str, sanitizers: str) -> str:
    """Its path; the test is skipped where it, its OpenMP or its sanitizers are missing."""
    path = COMPILERS[compiler]
    probe = [str(path), "-fopenmp", f"-fsanitize={sanitizers}", "-x", "c++", "-", "-o", os.devnull]
    if path is None or subprocess.run(probe, input=b"int main() {}", capture_output=True).returncode:
        pytest.skip(f"needs {compiler} with OpenMP and sanitizers (Debian: g++; clang-15 and libomp-15-dev)")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("compiler", COMPILERS)
def test_random_problems_are_right_and_nothing_is_read_out_of_bounds_or_too_late(compiler, tmp_path):
    path = needs(compiler, "address,undefined")
    trial = build(tmp_path, path, "-DRODE_DRIVER=ON", "-DRODE_SANITIZE=address,undefined") / "random_problems"
    suppressions = tmp_path / "leaks"
    suppressions.write_text(
        "leak:libomp.so\n"
    )  # Clang's runtime keeps what it made for a caller that has ended
    # GCC misplaces vectors of 64 bytes on the stack that is kept to see who reads it after a return.
    large = [isa for isa in ISAS if isa.startswith("avx512") and compiler == "g++"]
    others = [isa for isa in ISAS if isa not in large]

    def run(isas: list[str]) -> str:
        # what malloc gives is NaN until it is written
        options = f"detect_stack_use_after_return={int(isas is others)}:malloc_fill_byte=255:max_malloc_fill_size={1 << 30}"
        env = {"ASAN_OPTIONS": options, "UBSAN_OPTIONS": "print_stacktrace=1"}
        env["LSAN_OPTIONS"] = f"suppressions={suppressions}:print_suppressions=0"
        return check_call([str(trial), "0", "100", *isas], **env)

    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(run, filter(None, [others, large])))
    assert said[0].startswith("100 problems are right on generic")


@pytest.mark.slow
def test_threads_race_for_nothing(tmp_path):
    path = needs("clang++", "thread")
    trial = build(tmp_path, path, "-DRODE_DRIVER=ON", "-DRODE_SANITIZE=thread") / "random_problems"
    # Archer tells ThreadSanitizer which accesses OpenMP orders. The runtime itself is not instrumented.
    env = {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1", "ARCHER_OPTIONS": "verbose=1"}
    archer = "Archer detected OpenMP application with TSan"
    if archer not in check_call([str(trial), "0", "1", "generic"], **env):
        pytest.skip("needs Archer beside Clang's OpenMP runtime (Debian: libomp-15-dev)")
    assert "100 problems are right on generic" in check_call([str(trial), "0", "100", *ISAS], **env)


def test_sanitizing_threads_is_refused_without_clang(tmp_path):
    if COMPILERS["g++"] is None or tool("cmake") is None or tool("ninja") is None:
        pytest.skip("needs g++, cmake and ninja")
    with pytest.raises(AssertionError, match="RODE_SANITIZE=thread needs Clang"):
        build(tmp_path, COMPILERS["g++"], "-DRODE_DRIVER=ON", "-DRODE_SANITIZE=thread")


@pytest.mark.slow
@pytest.mark.skipif(
    CROSS is None or QEMU is None, reason="needs Debian's g++-aarch64-linux-gnu and qemu-user"
)
def test_random_problems_are_right_on_aarch64(tmp_path):
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    trial = build(tmp_path, CROSS, "-DRODE_DRIVER=ON", *target) / "random_problems"
    libraries = "/usr/aarch64-linux-gnu"  # where Debian has them
    assert (
        check_call([QEMU, "-L", libraries, str(trial), "0", "100", "generic"])
        == "100 problems are right on generic\n"
    )


@pytest.mark.slow
def test_the_emulator_runs_its_tests_under_sanitizers(tmp_path):
    path, pybind11 = needs("g++", "address,undefined"), pytest.importorskip("pybind11")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    options += ["-DPYBIND11_FINDPYTHON=ON", "-DRODE_EMULATE=ON", "-DRODE_SANITIZE=address,undefined"]
    folder = build(tmp_path / "build", path, *options, target="_emulator_trial _cuda_emulated")
    package = tmp_path / "rode_kernels"
    shutil.copytree(
        ROOT / "rode_kernels", package, ignore=shutil.ignore_patterns("__pycache__", "_cuda*.so", "_emu*.so")
    )
    for module in folder.glob("*.so"):
        shutil.copy(module, package)
    # Python itself is not instrumented, so the sanitizer's runtime has to be there first; what throws needs the C++ one, too.
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so")]
    runtimes = [subprocess.check_output([path, name], text=True).strip() for name in names]
    env = {"LD_PRELOAD": " ".join(runtimes), "ASAN_OPTIONS": "detect_leaks=0", "RODE_EMULATE": "1"}
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{ROOT / 'python'}"
    python = [sys.executable, "-P"]  # with no "." among the paths the copy is imported, not this checkout
    imported = check_call([*python, "-c", "import rode_kernels; print(rode_kernels.__file__)"], **env)
    assert imported.startswith(str(package))
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-o", "pythonpath=tests/support"]
    place = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    said = check_call([*python, "-m", "pytest", *options, *place, *EMULATED], **env)
    assert re.search(r"[1-9]\d* passed", said), said


# The trial kernels with their planted mistakes, and this repository's kernels at small sizes
EMULATED = [
    str(ROOT / "tests/csrc/test_emulator.py"),
    str(ROOT / "tests/rode_kernels/backends/cuda/test_backward.py"),
    "-m",
    "not slow and not gpu",
]


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
