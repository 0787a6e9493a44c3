"""The questions of a large file of records, each made when it is asked for, and packs of them."""

from __future__ import annotations

import os
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from rode_food.lazy_examples import LazyExamples
from rode_food.opening import ReadHandle
from rode_food.record_scan import EMPTY, HALF, Scan, scan_file
from rode_food.records import FoodRecord, RecordError, record_of_line, with_folder
from rode_food.tasks import Example


class FileExamples(LazyExamples[Example]):
    """Examples of one split of a file that is not gzip'ed, the same ones in the same order as if all were held.

    Held are some 50 bytes for each, in arrays that processes share after a fork; the file is read at the record's place when
    an example is taken.

    Args:
        scan: the source, split, wording and seed.
        processes: see `rode_food.record_scan.scan_file`.

    Attributes:
        bytes: int32, of question and answer of each example in UTF-8.
        flags: uint8, see `rode_food.record_scan`.

    Raises:
        RecordError, OSError: see `scan_file`; RecordError also when an example is taken after the file has changed.
    """

    _columns = (*LazyExamples._columns, "bytes", "flags")

    def __init__(self, scan: Scan, processes: int | None = None) -> None:
        super().__init__(scan.source, scan.wording, scan.seed)
        self.scan = scan
        self.path = os.path.abspath(scan.source.path)
        self._folder = Path(self.path).resolve().parent
        self._handle: ReadHandle | None = ReadHandle(self.path)
        self._identity = _identity(self._handle)
        found = scan_file(scan, processes)
        if _identity(ReadHandle(self.path)) != self._identity:
            raise self._changed()
        self._offsets, self._sizes = found.offsets, found.sizes
        self._pictures, self._n_pictures = found.pictures, found.n_pictures
        counts = found.counts
        self._record = np.repeat(np.arange(len(counts)), counts).astype(np.uint32)
        before = np.repeat(np.cumsum(counts, dtype=np.int64) - counts, counts)
        self._first = (np.arange(len(self._record)) - before).astype(np.uint16)
        self._stop = self._first + np.uint16(1)
        self.lengths, self.bytes, self.flags = found.lengths, found.bytes, found.flags

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _changed(self) -> RecordError:
        return RecordError(f"{self.path}: the file has changed since it was indexed; start again")

    def record(self, number: int) -> FoodRecord:
        if self._handle is None:
            self._handle = ReadHandle(self.path)
        if _identity(self._handle) != self._identity:
            raise self._changed()
        offset = int(self._offsets[number])
        record = record_of_line(self._handle.read(offset, int(self._sizes[number])), first=offset == 0)
        record = None if record is None else self.scan.kept(record)
        if record is None:
            raise self._changed()
        return with_folder(record, self._folder)

    @property
    def n_pictures(self) -> np.ndarray:
        """Pictures of each example."""
        return np.asarray(self._n_pictures[self._record])

    @property
    def picture_keys(self) -> np.ndarray:
        """A number for the pictures of each example, the same where they are the same; 0 without."""
        return np.asarray(self._pictures[self._record])

    @property
    def doubtful_texts(self) -> np.ndarray:
        """Whether each example has a text that is empty or cannot be written."""
        return np.asarray((self.flags & (EMPTY | HALF)) != 0)

    def pictures(self) -> list[str]:
        """The paths of all pictures, each once, in the order of the examples."""
        keys, first = np.unique(self.picture_keys, return_index=True)
        records = self._record[np.sort(first[keys != 0])]
        return list(dict.fromkeys(path for number in records for path in self.record(int(number)).images))

    def show_any(self, paths: Container[str]) -> np.ndarray:
        """Whether each example shows one of these pictures."""
        keys, first, which = np.unique(self.picture_keys, return_index=True, return_inverse=True)
        images = (
            self.record(int(self._record[place])).images if key else ()
            for key, place in zip(keys, first, strict=True)
        )
        return np.fromiter((any(path in paths for path in shown) for shown in images), bool, len(keys))[which]

    def packed(self, most: int) -> FilePacks:
        """The same questions in tuples of at most `most` about one picture (`rode.vlm.packing.pack_by_picture`)."""
        return FilePacks(self, most)


class FilePacks(Sequence[tuple[Example, ...]]):
    """Packs of a file's questions about one picture, in the order of the first question of each.

    Attributes:
        lengths: int64, characters of questions and answers of each pack.
    """

    def __init__(self, examples: FileExamples, most: int) -> None:
        self.examples = examples
        keys = examples.picture_keys
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        place = np.arange(len(keys))
        fresh = np.ones(len(keys), bool)
        fresh[1:] = keys[1:] != keys[:-1]
        rank = place - np.maximum.accumulate(np.where(fresh, place, 0)) if len(keys) else place
        starts = np.flatnonzero((rank % most == 0) | (keys == 0))  # nothing is shared without a picture
        stops = np.append(starts[1:], len(keys))
        packs = np.argsort(order[starts], kind="stable")
        self._order, self._starts, self._stops = order.astype(np.uint32), starts[packs], stops[packs]
        total = np.append(0, np.cumsum(examples.lengths[order], dtype=np.int64))
        self.lengths = total[self._stops] - total[self._starts]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> tuple[Example, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[Example, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[Example, ...] | list[tuple[Example, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        members = self._order[self._starts[index] : self._stops[index]]
        return tuple(self.examples[int(member)] for member in members)


def _identity(handle: ReadHandle) -> tuple[int, int]:
    """Changes when a file is written to."""
    status = os.fstat(handle.number)
    return status.st_size, status.st_mtime_ns
