"""What setup.py asks of CMake, with programs in place of the real ones: a kept build folder goes on only with the same tools."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["ASKED"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
for what, why in json.loads(os.environ.get("FAILS", "{{}}")).items():
    if what in sys.argv:
        print("[1/9] Building\\n" + why)
        sys.exit(1)
build = next((a for a in sys.argv if a.startswith("-DCMAKE_INSTALL_PREFIX=")), None)
if build:
    os.makedirs(build.split("=")[1], exist_ok=True)
    for name in ("_native", "_cuda"):
        open(os.path.join(build.split("=")[1], name + {sysconfig.get_config_var("EXT_SUFFIX")!r}), "w").close()
"""


@pytest.fixture
def configure(tmp_path):
    """A function (folder, environment) -> how CMake was asked to configure, by a build of a tree that holds only setup.py."""
    tree, programs = tmp_path / "tree", tmp_path / "programs"
    (tree / "rode_kernels").mkdir(parents=True)
    (tree / "rode_kernels/__init__.py").touch()
    shutil.copy(ROOT / "setup.py", tree)
    (tree / "pyproject.toml").write_text(
        '[project]\nname = "rode"\nversion = "0"\n[tool.setuptools]\npackages = ["rode_kernels"]\n'
    )
    programs.mkdir()
    (programs / "pybind11.py").write_text("def get_cmake_dir():\n    return '/pybind11'\n")
    for name, text in (("cmake", CMAKE), ("ninja", "#!/bin/sh\n"), ("nvcc", "#!/bin/sh\necho 13.0\n")):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    for name in ("c++", "other"):
        (programs / name).write_text(f"#!/bin/sh\necho {name} 12.0\n")
        (programs / name).chmod(0o755)

    def run(check: bool = True, **settings: str) -> list[str]:
        asked = tmp_path / "asked"
        asked.unlink(missing_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RODE_") and k != "CXX"}
        path = f"{programs}:{os.environ['PATH']}"
        env = {**kept, "PATH": path, "PYTHONPATH": str(programs), "ASKED": str(asked), **settings}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        run.done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        if check:
            assert run.done.returncode == 0, run.done.stderr
        return json.loads(asked.read_text().splitlines()[0]) if asked.is_file() else []

    run.programs, run.package = programs, tree / "rode_kernels"
    return run


def build_folder(command: list[str]) -> str:
    return command[command.index("-B") + 1]


def test_a_kept_folder_goes_on_with_the_same_tools_only(configure, tmp_path):
    kept = {"RODE_BUILD_DIR": str(tmp_path / "kept")}
    first = configure(**kept)
    assert build_folder(first) == kept["RODE_BUILD_DIR"]
    assert "--fresh" in first
    assert "--fresh" not in configure(**kept, RODE_CUDA="off", RODE_EMULATE="0")
    assert "--fresh" in configure(**kept, CXX="other")
    (configure.programs / "other").write_text("#!/bin/sh\necho other 13.0\n")  # the same path, upgraded
    assert "--fresh" in configure(**kept, CXX="other")
    assert "--fresh" in configure(**kept, CXX="other", CXXFLAGS="-g")
    assert "--fresh" not in configure(**kept, CXX="other", CXXFLAGS="-g")


def test_a_kept_folder_forgets_the_last_options(configure, tmp_path):
    kept = {"RODE_BUILD_DIR": str(tmp_path / "kept")}
    assert {"-DRODE_CUDA=ON", "-DRODE_CUDA_ARCHS=80;90"} <= {*configure(**kept, RODE_CUDA_ARCHS="80,90")}
    assert {"-DRODE_CUDA=ON", "-DRODE_CUDA_ARCHS=", "-DRODE_EMULATE=OFF"} <= {*configure(**kept)}
    assert "-DRODE_CUDA=OFF" in configure(**kept, RODE_CUDA="off")


def test_without_the_setting_setuptools_chooses_the_folder(configure, tmp_path):
    command = configure()
    assert Path(build_folder(command)).is_relative_to(tmp_path / "tree/build")
    assert "--fresh" in command


def test_a_relative_folder_is_within_the_tree(configure, tmp_path):
    assert build_folder(configure(RODE_BUILD_DIR="build/kept")) == str(tmp_path / "tree/build/kept")


ERROR = "core.cpp:7:1: error: '_Float16' does not name a type"


def test_a_compiler_that_fails_gives_the_pure_python_install_and_the_reason(configure):
    stale = configure.package / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    stale.touch()
    configure(FAILS=json.dumps({"--build": ERROR}))
    assert f"rode: cmake failed: {ERROR}\nrode: no native code" in configure.done.stderr
    assert not stale.exists()  # of other sources


def test_a_compiler_that_fails_stops_an_install_that_insists(configure):
    for insists in ({"RODE_NATIVE": "on"}, {"RODE_CUDA": "on"}):
        configure(check=False, FAILS=json.dumps({"--build": ERROR}), RODE_BUILD_DIR="kept", **insists)
        assert configure.done.returncode != 0
        assert configure.done.stderr.strip().endswith(f"cmake failed: {ERROR}")


def test_cuda_kernels_that_fail_leave_the_cpu_core(configure):
    message = "CMake Error at CMakeLists.txt:9 (message):\n  rode: CMake 3.25.1 does not know\n  that nvcc has C++20"
    configure(FAILS=json.dumps({"-DRODE_CUDA=ON": message}))
    assert "CMake 3.25.1 does not know that nvcc has C++20" in configure.done.stderr
    assert "trying again without the CUDA kernels" in configure.done.stderr
    assert [p.name.split(".")[0] for p in configure.package.glob("*.so")] == ["_native"]


def test_a_missing_tool_is_one_sentence(configure):
    (configure.programs / "ninja").unlink()
    others = [folder for folder in os.environ["PATH"].split(":") if not (Path(folder) / "ninja").exists()]
    configure(check=False, PATH=":".join([str(configure.programs), *others]))
    said = configure.done.stderr.strip().splitlines()[-1]
    assert said.startswith("native code cannot be built without ninja: run pip install ninja")
