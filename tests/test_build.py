"""`pip install .` in ordinary build isolation: both packages, native code where a compiler is, and no torch in the build."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from sass import ARCHS, NVCC, ROOT, cuobjdump

wheels = pytest.mark.xdist_group("wheels")  # in one process, for what they share


# `make` keeps its object files here. A wheel in ordinary build isolation reuses those whose commands are the same.
BUILD_DIR = f"build/native-{sys.implementation.cache_tag}"


def build(tmp_path: Path, **env: str) -> tuple[Path, str]:
    """A wheel, and the build's log; what setuptools leaves is in tmp_path."""
    tmp_path.mkdir(exist_ok=True)
    settings = tmp_path / "setuptools.cfg"
    settings.write_text(f"[build]\nbuild_base = {tmp_path / 'base'}\n")
    run = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path / "dist"), "."],
        cwd=ROOT,
        env={**os.environ, "RODE_BUILD_DIR": BUILD_DIR, "DIST_EXTRA_CONFIG": str(settings), **env},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    (wheel,) = (tmp_path / "dist").glob("rode-*.whl")
    return wheel, run.stdout + run.stderr


def missing_from(wheel: Path) -> set[str]:
    sources = subprocess.run(
        ["git", "ls-files", "python", "rode_kernels"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return {s.removeprefix("python/") for s in sources} - set(zipfile.ZipFile(wheel).namelist())


def native_modules(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    return {Path(n).name.split(".")[0] for n in names if n.startswith("rode_kernels/_") and n.endswith(".so")}


def compiled(log: str) -> set[str]:
    """CMake's targets of which something was compiled."""
    return set(re.findall(r"Building \w+ object CMakeFiles/(\w+)\.dir", log))


@pytest.mark.slow
@wheels
def test_wheel_holds_all_packages_and_native_code(tmp_path):
    wheel, log = build(tmp_path, RODE_NATIVE="on", RODE_CUDA="off", RODE_EMULATE="0")
    assert not missing_from(wheel), "tracked, but not in the wheel"
    assert native_modules(wheel) == {"_native"}
    assert log.count("RODE_CUDA=off: no CUDA kernels, CPU core only") == 1
    assert "Collecting torch" not in log


@pytest.mark.slow
@wheels
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_wheel_with_cuda_reuses_objects_and_imports_without_a_driver(tmp_path):
    """One architecture: tests/csrc compiles each kernel for all, and the next test reads the default."""
    options = {"RODE_CUDA": "on", "RODE_EMULATE": "0", "RODE_CUDA_ARCHS": "80"}
    build(tmp_path / "first", **options)
    wheel, log = build(tmp_path / "again", **options)
    # neither the CPU core nor the kernels; the bindings, because pybind11 is in another temporary folder each time
    assert compiled(log) == {"_native", "_cuda"}
    assert not missing_from(wheel)
    assert native_modules(wheel) == {"_native", "_cuda"}
    assert "warning" not in "\n".join(line for line in log.splitlines() if "csrc/" in line)
    assert "Collecting torch" not in log
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (module,) = (tmp_path / "site/rode_kernels").glob("_cuda.*.so")
    code = f"import importlib.util as u; s = u.spec_from_file_location('_cuda', {str(module)!r}); m = u.module_from_spec(s); "
    code += "s.loader.exec_module(m); print(m.ARCHITECTURES, m.runtime_version() > 0)"  # neither torch nor a driver
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["80", "True"]
    assert cuobjdump(), "needs cuobjdump: on PATH, or in Triton's wheel"
    listed = {
        kind: set(
            re.findall(
                r"sm_(\d+)", subprocess.check_output([cuobjdump(), f"--list-{kind}", str(module)], text=True)
            )
        )
        for kind in ("elf", "ptx")
    }
    assert listed == {"elf": {"80"}, "ptx": {"80"}}


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_kernels_are_built_for_every_architecture_by_default(tmp_path):
    """Read from what ninja would run: to compile them all takes minutes."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = [sys.executable, "-m", "cmake", "-S", str(ROOT), "-B", str(tmp_path), "-G", "Ninja"]
    cmake += [f"-DCMAKE_MAKE_PROGRAM={Path(sysconfig.get_path('scripts'), 'ninja')}", "-DRODE_CUDA=ON"]
    cmake += [f"-DPython_EXECUTABLE={sys.executable}", "-DPYBIND11_FINDPYTHON=ON"]
    subprocess.run([*cmake, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"], check=True)
    commands = (tmp_path / "build.ninja").read_text()
    flags = set(re.findall(r"--generate-code=arch=compute_(\d+),code=\[([\w,]+)\]", commands))
    newest = ARCHS[-1]
    assert flags == {
        *((str(arch), f"sm_{arch}") for arch in ARCHS[:-1]),
        (str(newest), f"compute_{newest},sm_{newest}"),
    }
    assert set(re.findall(r"RODE_CUDA_ARCHS=\S*?([\d,]+)", commands)) == {",".join(map(str, ARCHS))}


@pytest.mark.slow
@wheels
@pytest.mark.parametrize(
    "why", [{"RODE_NATIVE": "off"}, {"CXX": "/no/such/compiler"}], ids=["off", "no compiler"]
)
def test_pure_python_wheel_works_on_reference(tmp_path, why):
    wheel, log = build(tmp_path, **why)
    assert "pure-Python install, calls run on the slower 'reference' backend" in log
    assert "none-any" in wheel.name
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    code = """
import sys, torch
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]  # this environment's own install
import rode_kernels
assert rode_kernels.__file__.startswith(sys.argv[1]), rode_kernels.__file__
assert not rode_kernels.backends()["cpu"].available
x, A, B, W = torch.randn(3, 4), torch.randn(2, 4), torch.randn(5, 2), torch.randn(1, 4)
y = rode_kernels.rectified_mixture(x, A, B, W, ranks=(2,), scaling=(1.0,))
assert torch.allclose(y, torch.relu(x @ W.T) * (x @ A.T @ B.T), atol=1e-5)
"""
    env = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "reference" in run.stderr


def configure(tmp_path: Path, **env: str) -> list[str]:
    """What setup.py tells CMake when a build begins; nothing is built."""
    tools = tmp_path / "tools"
    tools.mkdir()
    record = tools / "said"
    for name, script in {"cmake": f'echo "$@" >> {record}', "c++": "", "nvcc": ""}.items():
        (tools / name).write_text(f"#!/bin/sh\n{script}\n")
        (tools / name).chmod(0o755)
    (tools / "pybind11.py").write_text("def get_cmake_dir():\n    return 'pybind11'\n")
    places = ["--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib")]
    settings = {"RODE_NATIVE": "on", "RODE_EMULATE": "0", "RODE_CUDA_ARCHS": "", "CXX": "", "CUDACXX": "nvcc"}
    paths = {"PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": str(tools)}
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", *places],
        cwd=ROOT,
        env={**os.environ, **settings, **paths, **env},
        check=True,
        capture_output=True,
    )
    return record.read_text().splitlines()[0].split()


def test_a_build_folder_that_had_cuda_does_not_keep_it(tmp_path):
    said = configure(tmp_path, RODE_CUDA="off")
    assert "-DRODE_CUDA=OFF" in said  # CMake remembers what it is not told


def test_a_build_folder_for_one_architecture_does_not_keep_to_it(tmp_path):
    said = configure(tmp_path, RODE_CUDA="on")
    assert {"-DRODE_CUDA=ON", "-DRODE_CUDA_ARCHS="} <= set(said)


def test_cmake_gets_the_architectures_that_are_asked_for(tmp_path):
    assert "-DRODE_CUDA_ARCHS=80;90" in configure(tmp_path, RODE_CUDA="on", RODE_CUDA_ARCHS="80,90")
