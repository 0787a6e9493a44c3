"""Builds the native core with CMake and ninja where a C++ compiler is; metadata stands in pyproject.toml.

RODE_NATIVE=off builds a pure-Python package, RODE_NATIVE=on insists on native code, anything else takes what it finds.
RODE_EMULATE=1 also builds the CUDA emulator, which only tests use.
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


def wants_native() -> bool:
    """Whether to build native code; says once why not."""
    choice = os.environ.get("RODE_NATIVE", "auto").lower()
    if choice not in ("auto", "on", "off"):
        raise SystemExit(f"RODE_NATIVE: expected auto, on or off, got {choice!r}")
    found = compiler()
    if choice == "on" and found is None:
        raise SystemExit("RODE_NATIVE=on, but no C++ compiler was found: install g++ or clang++, or set CXX")
    if choice == "off" or found is None or os.name == "nt":
        why = "RODE_NATIVE=off" if choice == "off" else "no C++ compiler found" if not found else "Windows"
        print(
            f"rode: {why}: pure-Python install, calls run on the slower 'reference' backend", file=sys.stderr
        )
        return False
    return True


EMULATE = os.environ.get("RODE_EMULATE") == "1"
NATIVE = "rode_kernels._native"
TRIAL = "rode_kernels._emulator_trial"  # a module of the same CMake build, that setuptools must know to copy


class CMakeBuild(build_ext):
    """Runs CMake once for all modules; a failing compiler fails the install, it is not hidden."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name != NATIVE:
            return
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_INSTALL_PREFIX={target}",
            f"-DPython_EXECUTABLE={sys.executable}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRODE_EMULATE={'ON' if EMULATE else 'OFF'}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)
        print("rode: this version has no GPU kernels; CPU core only", file=sys.stderr)


names = [NATIVE, *([TRIAL] if EMULATE else [])] if wants_native() else []
setup(ext_modules=[Extension(name, sources=[]) for name in names], cmdclass={"build_ext": CMakeBuild})
