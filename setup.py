"""Builds the native core with CMake and ninja where a C++ compiler is; metadata stands in pyproject.toml.

RODE_NATIVE=off builds a pure-Python package, RODE_NATIVE=on insists on native code, auto takes what it finds; RODE_CUDA says the
same of the CUDA kernels, which need nvcc, and RODE_CUDA_ARCHS="80;90" narrows the architectures they are built for.
RODE_EMULATE=1 also builds the CUDA emulator and the kernels for it, which only tests use.
RODE_BUILD_DIR names a folder that keeps object files for later builds; without it setuptools chooses one.
"""

from __future__ import annotations

import os
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


def cuda_options() -> list[str]:
    """CMake's options for CUDA; all are always given, because a reused build folder remembers the last ones."""
    if CUDA not in names:
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


class CMakeBuild(build_ext):
    """Runs CMake once for all modules; a failing compiler fails the install, it is not hidden."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != NATIVE:
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        kept = os.environ.get("RODE_BUILD_DIR")
        build = (ROOT / kept if kept else Path(self.build_temp) / ext.name).resolve()
        build.mkdir(parents=True, exist_ok=True)
        made_with, tools = build / "made-with.txt", toolchain()
        same = made_with.is_file() and made_with.read_text() == tools
        if CUDA not in names:
            say(f"{'no nvcc found' if nvcc() is None else 'RODE_CUDA=off'}: no CUDA kernels, CPU core only")
        configure = [
            *("cmake", *([] if same else ["--fresh"]), "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRODE_EMULATE={'ON' if EMULATE else 'OFF'}",
            *cuda_options(),
        ]
        subprocess.run(configure, check=True)
        made_with.write_text(tools)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


names = []
if wants_native():
    names = [NATIVE, *([CUDA] if wants_cuda() else []), *(EMULATED if EMULATE else [])]
setup(ext_modules=[Extension(name, sources=[]) for name in names], cmdclass={"build_ext": CMakeBuild})
