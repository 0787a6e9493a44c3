"""Imports run one way, and what handles records starts without torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"rode_kernels": ROOT, "rode_food": ROOT / "python", "rode": ROOT / "python"}
HEAVY = ("torch", "transformers", "peft", "accelerate")
# `rode` stands on both others, which know nothing of each other nor of it.
ALLOWED = {
    "rode_kernels": {"rode_kernels"},
    "rode_food": {"rode_food"},
    "rode": {"rode", "rode_food", "rode_kernels"},
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for file in sorted((folder / package).rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def test_an_installation_has_every_package():
    """An editable one finds those that pyproject.toml leaves out, too."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {
        file.parent.relative_to(base)
        for name, base in PACKAGES.items()
        for file in (base / name).rglob("*.py")
    }
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in folders)


def imports(file: Path) -> set[str]:
    """Whole names of what a file imports, anywhere in it: `from a import b` is a.b where that is a module, else a."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


GRAPH = {name: imports(file) for name, file in MODULES.items()}


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package):
    for name, found in GRAPH.items():
        if name.split(".")[0] == package:
            ours = {other.split(".")[0] for other in found} & set(PACKAGES)
            assert ours <= ALLOWED[package], f"{name} imports {sorted(found)}"


def test_no_file_imports_one_that_imports_it():
    """Not in a circle of any length either, and not within a function. A package's face does not count: it only lists names."""
    faces = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    graph = {name: (found & set(MODULES)) - faces for name, found in GRAPH.items() if name not in faces}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_backends_know_nothing_of_their_callers():
    above = {
        f"rode_kernels.{name}" for name in ("functional", "module", "autograd", "torch_ops", "fast_path")
    }
    for name, found in GRAPH.items():
        if name.startswith("rode_kernels.backends"):
            assert not found & above, name


def loaded_after(code: str) -> set[str]:
    """Names of the modules that a fresh process has loaded after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


def test_records_need_no_torch():
    names = [name for name in MODULES if name.split(".")[0] == "rode_food"]
    loaded = loaded_after("\n".join(f"import {name}" for name in names))
    assert set(names) <= loaded
    assert not loaded & set(HEAVY)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["train", "--help"], ["serve", "--help"], ["demo", "--help"], ["data", "--help"], ["data", "convert", "--help"]],
    ids=" ".join,
)  # fmt: skip
def test_the_command_starts_without_torch(arguments):
    code = f"from rode.cli import main\ntry:\n    main({arguments})\nexcept SystemExit as end:\n    assert not end.code"
    assert not loaded_after(code) & set(HEAVY)


def test_data_commands_run_without_torch(food, tmp_path):
    calls = [
        ["data", "inspect", str(food / "records.jsonl")],
        ["data", "convert", "records", str(food / "records.jsonl"), str(tmp_path / "out.jsonl")],
        ["data", "statistics", str(food / "records.jsonl"), str(tmp_path / "statistics")],
        [
            "data",
            "vocabulary",
            str(food / "records.jsonl"),
            str(tmp_path / "vocabulary.json"),
            "--all-records",
            "--min-count",
            "1",
        ],
        ["data", "shard", str(food / "records.jsonl"), str(tmp_path / "shards")],
    ]
    code = f"from rode.cli import main\nfor call in {calls}:\n    assert main(call) == 0, call"
    assert not loaded_after(code) & set(HEAVY)


PEFT_KNOWS = "import peft.mapping\nassert 'RODE' in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING"


@pytest.mark.parametrize(
    "code",
    [
        "import rode\nfrom peft import PeftModel",
        "import peft\nimport rode",
        "import rode\nimport transformers.integrations.peft\nimport peft",
        "import rode.vlm\nimport peft",
        "import rode.cli, peft",
        "from rode import RodeConfig",
    ],
)
def test_importing_rode_registers_the_method_whichever_comes_first(code):
    assert "rode.tuner" in loaded_after(f"{code}\n{PEFT_KNOWS}")


def test_without_peft_the_next_import_registers(tmp_path):
    """A first import that fails leaves the hook in place."""
    (tmp_path / "peft.py").write_text("raise ImportError('half installed')")
    code = (
        f"import sys, rode\nsys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import peft\nexcept ImportError:\n    pass\nelse:\n    raise SystemExit('it imported')\n"
        f"sys.path.pop(0)\nsys.path_importer_cache.clear()\n{PEFT_KNOWS}"
    )
    assert "rode.tuner" in loaded_after(code)
