"""One pass over a large file of records by several processes: where each record stands, and the sizes of its examples.

Each process reads a stretch of the file and gives numbers back, so that neither records nor examples are held.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import os
import pickle
import subprocess
import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import numpy as np

from rode_food.lazy_examples import examples_of
from rode_food.records import FoodRecord, RecordError, record_of_line, with_folder
from rode_food.source import Source, hash_split, within_fraction

logger = logging.getLogger(__name__)

EMPTY, HALF = 1, 2
"""Flags of an example: its question or answer is white space; it holds half of a surrogate pair, which no tokenizer takes."""
_STRETCH = 16 * 2**20  # bytes: a process is not started for less
_MOST_PROCESSES = 8


@dataclass(frozen=True)
class Scan:
    """A query of a file: see `rode_food.data_mixture.load_examples`."""

    source: Source
    split: str
    wording: str = "first"
    seed: int = 0

    def kept(self, record: FoodRecord) -> FoodRecord | None:
        """The record with its split, or None if its examples are not wanted.

        Raises:
            RecordError: it has no split, and the source does not make one.
        """
        source = self.source
        if record.split is None:
            if source.split_fractions is None:
                raise RecordError(
                    f"{os.fspath(source.path)}: record {record.id!r} has no split; "
                    "write one, or give the source split_fractions"
                )
            record = dataclasses.replace(record, split=hash_split(record.id, source.split_fractions))
        wanted = self.split != "train" or within_fraction(record.id, source.fraction)
        return record if record.split == self.split and wanted else None


_COLUMNS = {
    "ids": "Q",
    "id_offsets": "q",
    "id_lines": "q",
    "offsets": "q",
    "sizes": "q",
    "pictures": "Q",
    "n_pictures": "H",
    "counts": "H",
    "lengths": "i",
    "bytes": "i",
    "flags": "B",
}
"""Columns of what is found, with the kind of number that each holds (`array.array`)."""


@dataclass
class Stretch:
    """The numbers of the lines that one process read.

    Attributes:
        lines: how many there are, up to an error.
        columns: as in `Found`.
        error: what stopped it, and the number of its line.
    """

    lines: int = 0
    columns: dict[str, array[int]] = field(
        default_factory=lambda: {name: array(code) for name, code in _COLUMNS.items()}
    )
    error: tuple[int, Exception] | None = None


@dataclass(frozen=True)
class Found:
    """A file's records and examples in numbers.

    Attributes:
        ids, id_offsets, id_lines: of every record of every split: 64 bits of its id's hash, where its line begins and its
            number, from 0.
        offsets, sizes: of the line of each record that is kept, bytes.
        pictures: of each such record, 64 bits of the hash of its pictures' paths, 0 without; n_pictures: how many.
        counts: examples of each such record.
        lengths: characters of question and answer of each example; bytes: the same in UTF-8; flags: `EMPTY`, `HALF`.
    """

    ids: np.ndarray
    id_offsets: np.ndarray
    id_lines: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    pictures: np.ndarray
    n_pictures: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    bytes: np.ndarray
    flags: np.ndarray


def scan_stretch(scan: Scan, first: int, last: int) -> Stretch:
    """Read the lines that begin at bytes `first` to `last` (excluded) of the file."""
    found, folder = Stretch(), Path(scan.source.path).resolve().parent
    columns = found.columns
    for offset, raw in _lines(scan.source.path, first, last):
        try:
            record = record_of_line(raw, first=offset == 0)
            if record is not None:
                columns["ids"].append(_key(record.id))
                columns["id_offsets"].append(offset)
                columns["id_lines"].append(found.lines)
                kept = scan.kept(record)
                if kept is not None:
                    _add(columns, scan, with_folder(kept, folder), offset, len(raw))
        except ValueError as error:  # a RecordError, or a question's
            found.error = found.lines, error
            break
        found.lines += 1
    return found


def _add(columns: dict[str, array[int]], scan: Scan, record: FoodRecord, offset: int, size: int) -> None:
    examples = examples_of(record, scan.source.tasks, scan.wording, scan.seed, None)
    if not examples:
        return
    columns["offsets"].append(offset)
    columns["sizes"].append(size)
    columns["pictures"].append(_key("\0".join(record.images)) if record.images else 0)
    columns["n_pictures"].append(len(record.images))
    columns["counts"].append(len(examples))
    for example in examples:
        texts = (example.question, example.answer)
        flag = 0 if all(map(str.strip, texts)) else EMPTY
        try:
            bytes_ = sum(len(text.encode()) for text in texts)
        except UnicodeEncodeError:
            bytes_, flag = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts), flag | HALF
        columns["lengths"].append(sum(map(len, texts)))
        columns["bytes"].append(bytes_)
        columns["flags"].append(flag)


def _key(text: str) -> int:
    """64 bits of a hash, never 0. Two of a million texts share one with a probability of 3e-8."""
    digest = blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def _lines(path: str | os.PathLike[str], first: int, last: int) -> Iterator[tuple[int, bytes]]:
    """(offset, line) of the lines that begin in a stretch."""
    with open(path, "rb") as file:
        if first > 0:
            file.seek(first - 1)
            file.readline()  # the line before belongs to the stretch before
        offset = file.tell()
        while offset < last and (raw := file.readline()):
            yield offset, raw
            offset += len(raw)


def scan_file(scan: Scan, processes: int | None = None) -> Found:
    """The whole file's numbers as arrays.

    Args:
        scan: what to look for.
        processes: how many read it; by default one for each processor that this process may use, at most 8, and fewer for
            a file that is not worth them.

    Raises:
        RecordError: as `rode_food.records.read_records`, with file and line; also for an id that stands twice.
        OSError: the file cannot be read.
    """
    path = scan.source.path
    size = os.stat(path).st_size
    if processes is None:
        processes = max(1, min(_processors(), _MOST_PROCESSES, size // _STRETCH))
    bounds = [size * i // processes for i in range(processes + 1)]
    stretches = list(itertools.pairwise(bounds))
    whole, error = _join(_scan_all(scan, stretches))
    error = min(filter(None, (error, _repeated(scan, whole))), key=lambda found: found[0], default=None)
    if error is None:
        return whole
    line, problem = error
    if isinstance(problem, RecordError) and not str(problem).startswith(f"{path}: "):
        raise RecordError(f"{path}:{line + 1}: {problem}") from None
    raise problem


def _processors() -> int:
    """Processors for this process: with several of one run on this machine, its share."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return there // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _scan_all(scan: Scan, stretches: Sequence[tuple[int, int]]) -> list[Stretch]:
    """Each stretch by a process of its own, the first by this one.

    A process is started afresh, not forked: this one may have threads, and a script of a user's that has no
    `if __name__ == "__main__"` would be run again by multiprocessing.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"from {__name__} import main; main()"]
    with contextlib.ExitStack() as stack:
        others = []
        for stretch in stretches[1:]:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
            stack.callback(process.wait)
            stack.callback(process.kill)  # before the wait; of no effect on one that has ended
            assert process.stdin is not None, "a pipe was asked for"
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it may have ended by now
                pickle.dump((scan, *stretch), process.stdin)
            others.append(process)
        found = [scan_stretch(scan, *stretches[0])]
        for process, stretch in zip(others, stretches[1:], strict=True):
            assert process.stdout is not None, "a pipe was asked for"
            with process.stdout:
                output = process.stdout.read()
            if process.wait() == 0:
                found.append(pickle.loads(output))  # of a process of ours
            else:
                logger.warning(
                    "%s: a process that indexed it ended with %d; its part is read again, more slowly",
                    scan.source.path,
                    process.returncode,
                )
                found.append(scan_stretch(scan, *stretch))
    return found


def main() -> None:
    """A process of `scan_file`: takes its stretch from stdin, gives what it found to stdout."""
    scan, first, last = pickle.load(sys.stdin.buffer)
    pickle.dump(scan_stretch(scan, first, last), sys.stdout.buffer)


def _join(stretches: Sequence[Stretch]) -> tuple[Found, tuple[int, Exception] | None]:
    """The stretches as one, up to the first error, and that with its line in the file."""
    columns: dict[str, list[np.ndarray]] = {name: [] for name in _COLUMNS}
    lines, error = 0, None
    for stretch in stretches:
        for name, values in stretch.columns.items():
            columns[name].append(np.asarray(values))
        columns["id_lines"][-1] = columns["id_lines"][-1] + lines
        if stretch.error is not None:
            error = lines + stretch.error[0], stretch.error[1]
            break
        lines += stretch.lines
    return Found(**{name: np.concatenate(values) for name, values in columns.items()}), error


def _repeated(scan: Scan, whole: Found) -> tuple[int, Exception] | None:
    """The first id that stands twice, as an error with its line."""
    order = np.argsort(whole.ids, kind="stable")  # among equals, in the file's order
    ids = whole.ids[order]
    again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
    found = None
    for place in again:
        first = int(np.searchsorted(ids, ids[place]))
        line = int(whole.id_lines[order[place]])
        if found is not None and line >= found[0]:
            continue
        one, two = (_id_at(scan, int(whole.id_offsets[order[n]])) for n in (first, place))
        if one == two:
            earlier = int(whole.id_lines[order[first]]) + 1
            found = line, RecordError(f"id: {two!r} stands on line {earlier} already")
    return found


def _id_at(scan: Scan, offset: int) -> str:
    raw = next(iter(_lines(scan.source.path, offset, offset + 1)))[1]
    record = record_of_line(raw, first=offset == 0)
    assert record is not None, "it was a record a moment ago"
    return record.id
