"""Versions of the packages that RoDE builds on: what the tests ran with, and what is said about others.

docs/versions.md has the results. pyproject.toml and noxfile.py follow this table.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple


class Tried(NamedTuple):
    """The oldest and the newest release of a package that the tests passed with."""

    oldest: str
    newest: str


TRIED = {
    "torch": Tried("2.8.0", "2.15.0"),
    "transformers": Tried("5.5.4", "5.24.0"),
    "peft": Tried("0.21.0", "0.21.2"),
    "accelerate": Tried("1.3.0", "1.15.0"),
}


def check_versions() -> None:
    """Refuses a package that is older than those tried, and warns of one whose minor release is newer."""
    from packaging.version import Version

    for name, tried in TRIED.items():
        try:
            installed = Version(version(name))
        except PackageNotFoundError:  # a build of its own, without metadata
            continue
        if installed.release < Version(tried.oldest).release:
            raise ImportError(
                f"rode needs {name} {tried.oldest} or newer, and {installed} is installed: run pip install -U {name}"
            )
        if installed.release[:2] > Version(tried.newest).release[:2]:
            warnings.warn(
                f"rode was not tried with {name} {installed}; the newest it was tried with is {tried.newest}. If something "
                f"fails, run its tests (make test-versions) and report it, or pip install {name}=={tried.newest}.",
                stacklevel=2,
            )
