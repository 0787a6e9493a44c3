"""The file in which the library's readings are kept, so that a line is read once on a machine."""

from __future__ import annotations

import json
import os
import sqlite3
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

from rode_food.lines.library import Raw, from_values, to_values

CACHE_VARIABLE = "RODE_LINES_CACHE"
"""Names the file; "off" keeps nothing."""
_WAIT = 60.0  # seconds for another process's transaction
_MOST = 500  # of the parameters of one statement


def cache_path() -> Path | None:
    """The file: RODE_LINES_CACHE, else rode/ingredient_lines.sqlite in the user's cache folder; None for "off"."""
    named = os.environ.get(CACHE_VARIABLE)
    if named is not None and named.strip().lower() in ("", "off", "none"):
        return None
    if named:
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "rode" / "ingredient_lines.sqlite"


class Store:
    """Readings by text and version of the library. Several processes may read and write at a time.

    A file that cannot be used (no rights, a full disk, damage) costs a warning, not the run: lines are then read afresh.
    """

    def __init__(self, path: Path | None, version: str) -> None:
        self.path, self.version = path, version
        self._connection: sqlite3.Connection | None = None
        self._process = -1

    def get(self, texts: Iterable[str]) -> dict[str, Raw]:
        """The readings that are kept, of these texts."""
        wanted = list(dict.fromkeys(texts))
        found: dict[str, Raw] = {}
        try:
            connection = self._open()
            if connection is None:
                return {}
            for start in range(0, len(wanted), _MOST):
                some = wanted[start : start + _MOST]
                marks = ",".join("?" * len(some))
                rows = connection.execute(
                    f"SELECT text, reading FROM readings WHERE version = ? AND text IN ({marks})",
                    (self.version, *some),
                )
                found |= {text: from_values(json.loads(reading)) for text, reading in rows}
        except (sqlite3.Error, OSError, ValueError) as error:
            self._give_up(error)
        return found

    def put(self, readings: Mapping[str, Raw]) -> None:
        """Keeps readings, all or none of them."""
        try:
            connection = self._open() if readings else None
            if connection is None:
                return
            rows = [
                (self.version, text, json.dumps(to_values(raw), ensure_ascii=False))
                for text, raw in readings.items()
            ]
            with connection:
                connection.executemany("INSERT OR IGNORE INTO readings VALUES (?, ?, ?)", rows)
        except (sqlite3.Error, OSError, ValueError) as error:
            self._give_up(error)

    def _open(self) -> sqlite3.Connection | None:
        if self.path is None:
            return None
        # a connection must not be carried over a fork
        if self._connection is None or self._process != os.getpid():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=_WAIT, check_same_thread=False)
            # a killed process cannot damage the file even so; only a power cut can, and it is a cache
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(
                "CREATE TABLE IF NOT EXISTS readings (version TEXT, text TEXT, reading TEXT, "
                "PRIMARY KEY (version, text)) WITHOUT ROWID"
            )
            self._connection, self._process = connection, os.getpid()
        return self._connection

    def _give_up(self, error: Exception) -> None:
        warnings.warn(
            f"{self.path}: ingredient lines cannot be kept there ({error}); they are read afresh. Remove the file, or set "
            f"{CACHE_VARIABLE} to another one or to off",
            stacklevel=3,
        )
        self.path = self._connection = None
