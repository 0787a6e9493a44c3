"""Files opened whether they are gzip'ed or not."""

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
