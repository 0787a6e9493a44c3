"""The table of versions: what follows it, and what is said about versions outside it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest

from rode import versions
from rode.versions import TRIED, check_versions

ROOT = Path(__file__).parent.parent


@pytest.fixture
def install(monkeypatch):
    """A function that makes `check_versions` see other versions, the newest tried of those that are not named."""

    def pretend(**installed: str) -> None:
        found = {name: tried.newest for name, tried in TRIED.items()} | installed
        monkeypatch.setattr(versions, "version", found.__getitem__)

    return pretend


def test_the_project_admits_what_was_tried_and_newer():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in project["dependencies"])
    assert {name: required[name] for name in TRIED} == {
        name: f">={tried.oldest}" for name, tried in TRIED.items()
    }


def test_the_page_names_the_oldest_and_the_newest():
    page = (ROOT / "docs/versions.md").read_text()
    for name, tried in TRIED.items():
        assert f"| {name} | {tried.oldest} | {tried.newest} |" in page


@pytest.mark.parametrize("installed", [{}, {"torch": "2.15.7+cpu"}, {"peft": "0.21.9.dev0"}])
def test_versions_that_were_tried_pass_in_silence(install, installed):
    install(**installed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()


def test_the_oldest_pass_in_silence(install):
    install(**{name: tried.oldest for name, tried in TRIED.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions()


def test_a_newer_version_gives_one_warning(install):
    install(peft="9.1.0")
    newest = TRIED["peft"].newest
    said = f"was not tried with peft 9.1.0; the newest it was tried with is {newest}"
    with pytest.warns(UserWarning, match=said) as caught:
        check_versions()
    (warning,) = caught
    assert "make test-versions" in str(warning.message)
    assert f"pip install peft=={newest}" in str(warning.message)


def test_an_older_version_is_refused(install):
    install(transformers="4.57.6")
    oldest = TRIED["transformers"].oldest
    with pytest.raises(
        ImportError, match=rf"needs transformers {oldest} or newer, and 4\.57\.6 is installed"
    ):
        check_versions()


def test_a_build_without_metadata_is_let_through(monkeypatch):
    def no_metadata(name: str) -> str:
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", no_metadata)
    check_versions()


# What the check asks, replaced before `rode` is imported; transformers and torch get the true answers.
NEW = """
import importlib.metadata, sys
ask = importlib.metadata.version
asks_for_rode = lambda: sys._getframe(2).f_globals["__name__"] == "rode.versions"
importlib.metadata.version = lambda name: "99.0" if asks_for_rode() else ask(name)
"""


@pytest.mark.parametrize(
    "imports", [("import rode", "import peft"), ("import peft", "import rode"), ("import rode.tuner",)]
)
def test_the_check_runs_once_whichever_import_comes_first(imports):
    code = "\n".join([NEW, *imports])
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for name in TRIED:
        assert run.stderr.count(f"was not tried with {name} 99.0") == 1


def test_sessions_are_in_the_table():
    """Every version that a session runs with lies within what the table says."""
    listed = subprocess.run(
        [sys.executable, "-m", "nox", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    sessions = re.findall(r"^[*-] (\w+)\(([\d.]+)\)", listed, re.MULTILINE)
    assert {name for name, _ in sessions} == set(TRIED)

    def number(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split("."))

    for name, version in sessions:
        assert number(TRIED[name].oldest) <= number(version) <= number(TRIED[name].newest)


@pytest.mark.slow
@pytest.mark.parametrize("session", ["oldest", "newest"])
def test_a_combination_of_versions(session, tmp_path):
    """A model, its file and its training; `make test-versions` runs more tests with more versions."""
    train = "tests/rode/training/test_train.py"
    tests = [
        "tests/rode/tuner/test_llava.py",
        "tests/rode/vlm/test_load.py",
        f"{train}::test_it_learns_and_saves_the_adapter_alone",
        f"{train}::test_accumulated_batches_are_one_batch",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    subprocess.run(
        [sys.executable, "-m", "nox", "--envdir", str(tmp_path), "--session", session, "--", *tests],
        cwd=ROOT,
        env=environment,
        check=True,
    )
