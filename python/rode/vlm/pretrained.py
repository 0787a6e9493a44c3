"""Loading what transformers saved, without running Python code that lies beside it."""

from __future__ import annotations

import os
from typing import Any


def from_pretrained(cls: Any, path: str | os.PathLike[str], **options: Any) -> Any:
    """`cls.from_pretrained(path, **options)` with transformers' own classes alone.

    Left alone, transformers asks on stdin whether it may run the Python files of a folder with `auto_map`.

    Raises:
        ValueError: the folder needs code of its own.
    """
    try:
        return cls.from_pretrained(str(path), trust_remote_code=False, **options)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{path}: {cls.__name__} would run Python code that lies there (auto_map), which rode never does; take one that "
            "transformers loads with classes of its own"
        ) from error
