"""What a release needs: one version, an sdist that holds all that is tracked, and files for the forge that name what exists."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import rode

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def test_the_version_is_in_one_place_and_the_others_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "rode.__version__"}
    newest = re.search(
        r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert newest
    assert newest[1] == rode.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == rode.__version__


def test_the_citation_has_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2407.12730"
    assert len(paper["authors"]) == 6


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_make_what_can_be_made(workflow):
    found = yaml.safe_load(workflow.read_text())
    assert found[True]  # `on`, to YAML
    steps = [step for job in found["jobs"].values() for step in job["steps"]]
    made = [step["run"].split() for step in steps if step.get("run", "").startswith("make ")]
    assert made or workflow.stem == "wheels"
    for command in made:
        subprocess.run(["make", "-n", *command[1:]], cwd=ROOT, check=True, capture_output=True)


def test_make_help_names_every_target():
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    said = subprocess.check_output(["make", "--no-print-directory", "help"], cwd=ROOT, text=True)
    assert {line.split()[1] for line in said.splitlines()} == set(phony.split())


def test_the_sdist_holds_all_that_is_tracked(tmp_path):
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    tracked = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
    for name in tracked:  # a copy, where setuptools may leave its files
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    code = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=tmp_path / "tree",
        env={**os.environ, "RODE_NATIVE": "off"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (sdist,) = tmp_path.glob("rode-*.tar.gz")
    assert sdist.name == f"rode-{rode.__version__}.tar.gz"
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert not {name for name in tracked - names if not name.startswith((".github/", ".gitignore"))}
    assert not [name for name in names if name.endswith((".so", ".pyc"))]
