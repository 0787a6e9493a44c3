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

    def run(**settings: str) -> list[str]:
        asked = tmp_path / "asked"
        asked.unlink(missing_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RODE_") and k != "CXX"}
        path = f"{programs}:{os.environ['PATH']}"
        env = {**kept, "PATH": path, "PYTHONPATH": str(programs), "ASKED": str(asked), **settings}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(asked.read_text().splitlines()[0])

    run.programs = programs
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
