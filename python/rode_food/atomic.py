"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Literal, overload


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
        OSError: what the system says (a full disk, say), with `path` named; nothing is left behind.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode: expected w or wb, got {mode!r}")
    path = Path(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoding, newline = ("utf-8", "\n") if mode == "w" else (None, None)
        with aside.open(mode, encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(
                file.fileno()
            )  # else a power cut after the rename can leave an empty file under the name
        os.replace(aside, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 aside, then rename; makes the folder if need be."""
    with replacing(path) as file:
        file.write(text)
