"""The manifest of a checkpoint: name, size and SHA-256 of every file, which tell a whole checkpoint from a damaged one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from rode_food.atomic import write_json

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Take down every file of a folder. It is the last to be written there."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"files": files})


def damage(folder: Path, *, contents: bool = True) -> str | None:
    """Say what is wrong with a folder that has a manifest; None for a whole one.

    Args:
        folder: of the checkpoint.
        contents: read every byte; False looks at names and sizes alone.
    """
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        entries = [(name, int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for name, size, _ in entries:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (there := path.stat().st_size) != size:
            return f"{name} has {there} bytes instead of {size}"
    for name, _, digest in entries if contents else ():
        if _digest(folder / name) != digest:
            return f"{name} has changed since it was written (its SHA-256 is another)"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
