"""Files opened for reading: whether they are gzip'ed or not, and at any offset."""

from __future__ import annotations

import gzip
import os
from typing import IO, cast

GZIP = b"\x1f\x8b"
"""The first bytes of a gzip'ed file."""


def open_data(path: str | os.PathLike[str]) -> IO[bytes]:
    """The file's bytes, unpacked where they are gzip'ed; to be closed."""
    file = open(path, "rb")  # noqa: SIM115
    if file.peek(2)[:2] != GZIP:
        return file
    file.close()
    return cast(IO[bytes], gzip.open(path, "rb"))


class ReadHandle:
    """A file open for reading at any offset. It is closed with the last reference: another thread may read from it still."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))

    def __del__(self) -> None:
        number = getattr(self, "number", None)
        if number is not None:
            os.close(number)

    def read(self, offset: int, size: int) -> bytes:
        # Reading at an offset moves no position, so that threads, and processes that inherited the handle, do not meet.
        if hasattr(os, "pread"):
            return os.pread(self.number, size, offset)
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.read(size)
