"""Files found by name, whichever way their accented letters are written on disk."""

from __future__ import annotations

import os
import unicodedata
from functools import lru_cache
from pathlib import Path


def look_up(path: Path) -> Path:
    """The file as its folder has it: a name may be composed there (é) and decomposed in the data (e and an accent), or the other
    way round; macOS writes such names. The path itself where it is there, or nothing like it is."""
    if path.exists() or str(path).isascii():
        return path
    return _as_stored(path) or path


def _as_stored(path: Path) -> Path | None:
    folder = path.parent
    if folder == path:
        return None
    if not folder.exists():
        found = _as_stored(folder)
        if found is None:
            return None
        folder = found
    if (folder / path.name).exists():
        return folder / path.name
    try:
        names = _names(str(folder), os.stat(folder).st_mtime_ns)
    except OSError:
        return None
    name = names.get(unicodedata.normalize("NFC", path.name))
    return None if name is None else folder / name


@lru_cache(maxsize=64)
def _names(folder: str, changed: int) -> dict[str, str]:
    """Composed form of each name in a folder -> the name; only those with letters beyond ASCII."""
    names = sorted(name for name in os.listdir(folder) if not name.isascii())
    return {unicodedata.normalize("NFC", name): name for name in names}
