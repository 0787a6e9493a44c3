"""An index from ids to the bytes of a huge JSON array: it joins files of a million entries without holding them."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rode_food.readers.common import id_hash
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog


class Found(NamedTuple):
    value: dict[str, Any]
    line: int


class JsonIndex:
    """Entries of a JSON array by their `id`: 24 bytes of memory an entry, 44 while it is built; values stay in the file.

    An id that stands twice is told to the log; the first entry counts.
    """

    def __init__(self, path: Path, log: ReadLog, *, keys: tuple[str, ...]) -> None:
        """Reads the file once.

        Args:
            path: a JSON array of objects.
            log: is told of broken entries.
            keys: of every entry; entries that lack one are broken. `id` is one of them and a string.

        Raises:
            FileNotFoundError, RecordError: see `read_json_array`.
        """
        import numpy as np  # comes with transformers; not for whoever reads other kinds

        self.path = path
        hashes, offsets, lengths, lines = array("Q"), array("Q"), array("I"), array("I")
        for entry in read_json_array(path, log, keys=keys):
            missing = [key for key in keys if key not in entry.value]
            if missing or not isinstance(entry.value["id"], str):
                log.leave_out_broken(
                    f"no {missing[0]}" if missing else "an id that is no string", file=path, line=entry.line
                )
                continue
            hashes.append(id_hash(entry.value["id"]))
            offsets.append(entry.offset)
            lengths.append(entry.length)
            lines.append(entry.line)
        as_numpy = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
        order = np.argsort(as_numpy, kind="stable")  # equal hashes stay in the file's order
        self._hashes, self._offsets, self._lengths, self._lines = (
            array(column.typecode, np.frombuffer(column, column.typecode)[order].tobytes() if column else b"")
            for column in (hashes, offsets, lengths, lines)
        )
        self._file = path.open("rb")
        ordered = as_numpy[order]
        for at in np.flatnonzero(ordered[1:] == ordered[:-1]) + 1:
            value = self._read(int(at))
            earlier = (other for other in self._places(self._hashes[at]) if other < at)
            if any(self._read(other)["id"] == value["id"] for other in earlier):
                log.leave_out_broken(
                    "an id that stands twice", file=path, line=self._lines[at], detail=value["id"]
                )

    def __len__(self) -> int:
        return len(self._hashes)

    def get(self, identifier: str) -> Found | None:
        """The entry of this id and its line, or None."""
        for at in self._places(id_hash(identifier)):
            value = self._read(at)
            if value["id"] == identifier:
                return Found(value, self._lines[at])
        return None

    def close(self) -> None:
        self._file.close()

    def _places(self, hashed: int) -> Iterator[int]:
        at = bisect_left(self._hashes, hashed)
        while at < len(self._hashes) and self._hashes[at] == hashed:
            yield at
            at += 1

    def _read(self, at: int) -> dict[str, Any]:
        self._file.seek(self._offsets[at])
        value: dict[str, Any] = json.loads(self._file.read(self._lengths[at]))
        return value
