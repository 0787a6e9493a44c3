"""Builds the native core with CMake and ninja where a C++ compiler is; metadata stands in pyproject.toml.

RODE_NATIVE=off builds a pure-Python package, RODE_NATIVE=on insists on native code, auto takes what it finds and what compiles;
RODE_CUDA says the same of the CUDA kernels, which need nvcc; RODE_CUDA_ARCHS="80;90" narrows the architectures they are built for.
RODE_EMULATE=1 also builds the CUDA emulator and the kernels for it, which only tests use.
RODE_BUILD_DIR names a folder that keeps object files for later builds; without it setuptools chooses one.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def compiler() -> str | None:
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)


def nvcc() -> str | None:
    default = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin/nvcc"
    return shutil.which(os.environ.get("CUDACXX", "nvcc")) or shutil.which(default)


def choice(variable: str) -> str:
    value = os.environ.get(variable, "auto").lower()
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{variable}: expected auto, on or off, got {value!r}")
    return value


def say(text: str) -> None:
    print(f"rode: {text}", file=sys.stderr)


def wants_native() -> bool:
    """Whether to build native code; says once why not."""
    wanted, found = choice("RODE_NATIVE"), compiler()
    if wanted == "on" and found is None:
        raise SystemExit("RODE_NATIVE=on, but no C++ compiler was found: install g++ or clang++, or set CXX")
    if wanted == "off" or found is None or os.name == "nt":
        why = "RODE_NATIVE=off" if wanted == "off" else "no C++ compiler found" if not found else "Windows"
        say(f"{why}: pure-Python install, calls run on the slower 'reference' backend")
        return False
    return True


def wants_cuda() -> bool:
    wanted, found = choice("RODE_CUDA"), nvcc()
    if wanted == "on" and found is None:
        raise SystemExit("RODE_CUDA=on, but nvcc was not found: install the CUDA toolkit, or set CUDACXX")
    return wanted != "off" and found is not None


def cuda_options(cuda: bool) -> list[str]:
    """CMake's options for CUDA; all are always given, because a reused build folder remembers the last ones."""
    if not cuda:
        return ["-DRODE_CUDA=OFF"]
    archs = os.environ.get("RODE_CUDA_ARCHS", "").replace(",", ";")
    if not all(arch.isdigit() for arch in archs.split(";") if arch):
        raise SystemExit(f"RODE_CUDA_ARCHS: expected compute capabilities such as '80;90', got {archs!r}")
    return ["-DRODE_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc()}", f"-DRODE_CUDA_ARCHS={archs}"]


def toolchain() -> str:
    """A description of all that CMake reads only once for a build folder: it cannot go on there after a change of these."""
    tools = [tool for tool in (compiler(), nvcc()) if tool]
    versions = [subprocess.run([tool, "--version"], capture_output=True, text=True).stdout for tool in tools]
    flags = ("CXX", "CXXFLAGS", "LDFLAGS", "CUDAFLAGS", "CUDAHOSTCXX")
    settings = [f"{name}={os.environ.get(name, '')}" for name in flags]
    return "\n".join([str(ROOT), sys.executable, sys.version, *tools, *versions, *settings])


EMULATE = os.environ.get("RODE_EMULATE") == "1"
# Modules of one CMake build, all of which setuptools must know, to copy them.
NATIVE, CUDA = "rode_kernels._native", "rode_kernels._cuda"
EMULATED = ["rode_kernels._emulator_trial", "rode_kernels._cuda_emulated"]


class BuildFailed(Exception):
    """CMake or a compiler failed; the message is the first line with an error."""


def run(*command: str) -> None:
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        lines = []
        for line in process.stdout or ():
            sys.stdout.write(line)
            lines.append(line.strip())
    if process.returncode == 0:
        return
    # a compiler's "file:line: error: text"; CMake's "CMake Error at file:line (message):" has its text below
    at = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.IGNORECASE)), -1)
    text = " ".join(lines[at : at + 4] if lines[at].endswith(":") else [lines[at]]) if lines else ""
    raise BuildFailed(f"{Path(command[0]).name} failed: {text or f'exit code {process.returncode}'}")


def check_tools() -> None:
    """Stops without what `[build-system]` in pyproject.toml names, which pip brings unless it is told not to."""
    missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if importlib.util.find_spec("pybind11") is None:
        missing.append("pybind11")
    if missing:
        raise SystemExit(
            f"native code cannot be built without {' and '.join(missing)}: run pip install {' '.join(missing)}, "
            "leave out --no-build-isolation, or set RODE_NATIVE=off"
        )


class CMakeBuild(build_ext):
    """Runs CMake once for all modules. What is not insisted on may fail: the log says why, and the package works without it."""

    def run(self) -> None:
        self.failed: list[str] = []
        super().run()
        for name in self.failed if self.inplace else ():
            # what an earlier build left in the source tree is of other sources
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        if ext.name != NATIVE:
            return
        check_tools()
        if CUDA not in names:
            say(f"{'no nvcc found' if nvcc() is None else 'RODE_CUDA=off'}: no CUDA kernels, CPU core only")
        try:
            self.build_with_cmake(CUDA in names)
            return
        except BuildFailed as error:
            why = error
        if CUDA in names and choice("RODE_CUDA") != "on":
            say(f"{why}")
            say("trying again without the CUDA kernels (RODE_CUDA=on would stop here)")
            try:
                self.build_with_cmake(False)
                self.failed = [CUDA]
                return
            except BuildFailed as error:
                why = error
        if choice("RODE_NATIVE") == "on" or choice("RODE_CUDA") == "on":
            raise SystemExit(f"{why}")
        say(f"{why}")
        say("no native code: calls run on the slower 'reference' backend (RODE_NATIVE=on would stop here)")
        self.failed = names

    def build_with_cmake(self, cuda: bool) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(NATIVE)).resolve().parent
        kept = os.environ.get("RODE_BUILD_DIR")
        build = (ROOT / kept if kept else Path(self.build_temp) / NATIVE).resolve()
        build.mkdir(parents=True, exist_ok=True)
        made_with, tools = build / "made-with.txt", toolchain()
        same = made_with.is_file() and made_with.read_text() == tools
        configure = [
            *("cmake", *([] if same else ["--fresh"]), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRODE_EMULATE={'ON' if EMULATE else 'OFF'}",
            *cuda_options(cuda),
        ]
        run(*configure)
        made_with.write_text(tools)
        run("cmake", "--build", str(build))
        run("cmake", "--install", str(build))


names = []
if wants_native():
    names = [NATIVE, *([CUDA] if wants_cuda() else []), *(EMULATED if EMULATE else [])]
# optional: setuptools copies what was built, and misses nothing
modules = [Extension(name, sources=[], optional=True) for name in names]
setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
