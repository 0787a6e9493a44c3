"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, overload


@contextmanager
def written_aside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path`, for code that writes a file or a folder by its name; renamed once the block has ended well.

    Args:
        path: the file or folder; the folder around it is made if need be. A folder cannot replace one that holds something.

    Raises:
        OSError: what the system says (a full disk, say), with `path` named; nothing is left behind.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(aside)  # of a killed process that had our number
        yield aside
        sync(aside)
        os.replace(aside, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        _remove(aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Put a file, or all files of a folder, on the disk: else a power cut after the rename can leave them empty."""
    files = (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else (path,)
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


@overload
def replacing(path: str | os.PathLike[str], mode: Literal["w"] = "w") -> AbstractContextManager[IO[str]]: ...
@overload
def replacing(path: str | os.PathLike[str], mode: Literal["wb"]) -> AbstractContextManager[IO[bytes]]: ...
@contextmanager
def replacing(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file that takes the name `path` once the block has ended well; until then an older one stays as it was.

    Args:
        path: the file; its folder is made if need be.
        mode: "w" for UTF-8 text with "\\n" as it stands, "wb" for bytes.

    Raises:
        OSError: as `written_aside`.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode: expected w or wb, got {mode!r}")
    encoding, newline = ("utf-8", "\n") if mode == "w" else (None, None)
    with written_aside(path) as aside, aside.open(mode, encoding=encoding, newline=newline) as file:
        yield file


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 aside, then rename; makes the folder if need be."""
    with replacing(path) as file:
        file.write(text)


def write_json(path: str | os.PathLike[str], value: Any, *, allow_nan: bool = True) -> None:
    """Write `json_text` aside, then rename; makes the folder if need be.

    Raises:
        ValueError: a number is not finite, with `allow_nan` False.
    """
    write_text(path, json_text(value, allow_nan=allow_nan))


def json_text(value: Any, *, allow_nan: bool = True) -> str:
    """JSON that a person can read and a diff can show: one key a line, but arrays and innermost objects on one line each."""
    plain = json.loads(json.dumps(value, allow_nan=allow_nan))  # tuples are arrays now, and keys text
    return _json(plain, "\n", outermost=True) + "\n"


def _json(value: Any, newline: str, outermost: bool = False) -> str:
    below = newline + " "
    if isinstance(value, dict) and value and (outermost or not all(map(_is_leaf, value.values()))):
        entries = [f"{below}{_dump(key)}: {_json(item, below)}" for key, item in value.items()]
        return "{" + ",".join(entries) + newline + "}"
    if isinstance(value, list) and any(map(_holds_objects, value)):
        return "[" + ",".join(below + _json(item, below) for item in value) + newline + "]"
    return _dump(value)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_leaf(value: Any) -> bool:
    """Whether it is a plain value, an array of plain values, or empty."""
    if isinstance(value, list):
        return not any(isinstance(item, dict | list) for item in value)
    return not isinstance(value, dict) or not value


def _holds_objects(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and any(map(_holds_objects, value)))
