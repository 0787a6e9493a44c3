"""The kind of a file by its first bytes, not by its name."""

from __future__ import annotations

import csv
import json
import os
import pickletools
import zlib
from pathlib import Path
from typing import NamedTuple

from rode_food.opening import GZIP, open_data
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog

_HEAD = 1 << 16
_JSON_SPACE = " \t\r\n"  # RFC 8259, section 2: other white space is none in JSON
_WHOLE = 1 << 26  # a JSON object over several lines is looked for in files up to this size

_MAGIC = (
    (b"PK\x03\x04", "a zip archive", "unpack it and name what is in it"),
    (b"PK\x05\x06", "an empty zip archive", "unpack it and name what is in it"),
    (b"BZh", "a bzip2 file", "unpack it first"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it first"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first"),
    (b"Rar!", "a rar archive", "unpack it first"),
    (b"\xff\xd8\xff", "a JPEG picture", "name the file that says what is on it"),
    (b"\x89PNG\r\n", "a PNG picture", "name the file that says what is on it"),
    (b"GIF8", "a GIF picture", "name the file that says what is on it"),
    (b"\x89HDF", "an HDF5 file", "write it as JSON lines"),
    (b"\x93NUMPY", "a NumPy array", "write it as JSON lines"),
    (b"SQLite format 3\0", "an SQLite database", "write it as JSON lines"),
    (b"%PDF", "a PDF", "write it as JSON lines"),
    (
        b"ARROW1",
        "an Arrow file",
        "name the folder that `datasets.save_to_disk` wrote, or write it as Parquet",
    ),
    (b"\xff\xff\xff\xff", "an Arrow stream", "name the folder that `datasets.save_to_disk` wrote"),
    (b"\xff\xfe", "UTF-16 text", "save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "save it as UTF-8"),
)


class FileKind(NamedTuple):
    """The kind of a file.

    Attributes:
        name: in words: "JSON lines of records", "a CSV table".
        reader: the key of `rode_food.readers.READERS` that reads it, or None.
        advice: the next step, in words.
    """

    name: str
    reader: str | None = None
    advice: str = ""


def file_kind(path: str | os.PathLike[str]) -> FileKind:
    """The kind of a file by its content. Nothing is unpickled, and a few buffers at most are read of what is not text."""
    path = Path(path)
    with path.open("rb") as file:
        head = file.read(_HEAD)
    packed = head[:2] == GZIP
    if packed:
        try:
            with open_data(path) as file:
                head = file.read(_HEAD)
        except (OSError, EOFError, zlib.error) as error:
            return FileKind("a damaged gzip file", None, f"copy it again ({error})")
    found = _of_bytes(head) or (FileKind("a Parquet file") if head[:4] == b"PAR1" else _of_text(path, head))
    if found.name == "a Parquet file":
        found = FileKind(found.name, None, "unpack it first") if packed else _of_parquet(path)
    return found._replace(name=f"gzip'ed: {found.name}") if packed else found


def _of_bytes(head: bytes) -> FileKind | None:
    if not head.strip():
        return FileKind("an empty file", None, "there is nothing in it")
    for magic, name, advice in _MAGIC:
        if head.startswith(magic):
            return FileKind(name, None, advice)
    if head[257:262] == b"ustar":
        return FileKind(
            "a tar archive", None, "unpack it; for shards name their folder, which holds index.json"
        )
    if _is_pickle(head):
        return FileKind(
            "a pickle", None, "it is never unpickled, because that runs code; write it as JSON lines"
        )
    if b"\0" in head and head[:4] != b"PAR1":
        return FileKind("binary data of an unknown kind", None, "write it as JSON lines")
    return None


def _is_pickle(head: bytes) -> bool:
    if head[0] == 0x80 and head[1:2] in b"\x02\x03\x04\x05":  # so protocols 2 to 5 begin
        return True
    if not head.endswith(b"."):
        return False
    try:  # to list the opcodes runs none of them
        return sum(1 for _ in pickletools.genops(head)) > 2
    except (ValueError, OverflowError, UnicodeError):
        return False


def _of_parquet(path: Path) -> FileKind:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return FileKind("a Parquet file", None, "pip install 'rode[data]' to read it")
    try:
        columns = pyarrow.parquet.ParquetFile(path).schema_arrow.names
    except (pyarrow.ArrowException, OSError) as error:
        return FileKind("a damaged Parquet file", None, f"copy it again ({' '.join(str(error).split())})")
    if "messages" in columns:
        return FileKind("a Parquet file of messages", "messages", _convert("messages", path))
    return FileKind(
        "a Parquet file",
        None,
        f"it has the columns {', '.join(columns)}; expected messages, and images",
    )


def _convert(kind: str, path: Path) -> str:
    return f"rode data convert {kind} {path} records.jsonl"


def _of_text(path: Path, head: bytes) -> FileKind:
    text = head.decode("utf-8-sig", "replace")
    start = text.lstrip(_JSON_SPACE)[:1]
    if start == "[":
        return _of_array(path)
    if start == "{":
        return _of_lines(path)
    lines = text.splitlines()
    for delimiter, name in (
        (",", "a CSV table"),
        ("\t", "a table with tabs between columns"),
        (";", "a CSV table"),
    ):
        rows = list(csv.reader(lines[: max(2, min(len(lines) - 1, 20))], delimiter=delimiter))
        rows = [row for row in rows if row]
        if len(rows) > 1 and len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
            return FileKind(name, None, "write it as JSON lines, one object a row (docs/records.md)")
    name = "text" if "\ufffd" not in text else "text that is not UTF-8"
    return FileKind(name, None, "expected JSON lines of records (docs/records.md)")


def _of_array(path: Path) -> FileKind:
    first = next((entry.value for entry in read_json_array(path, ReadLog())), None)
    if first is None:
        return FileKind("a JSON array without objects", None, "expected one object a line (docs/records.md)")
    if "conversations" in first:
        return FileKind("a LLaVA-instruct array", "llava-instruct", _convert("llava-instruct", path))
    if "messages" in first:
        return FileKind("a JSON array of messages", "messages", _convert("messages", path))
    what = "a JSON array of records" if {"id", "source"} <= first.keys() else "a JSON array of objects"
    return FileKind(what, None, f"write one object a line: jq -c '.[]' {path} > records.jsonl")


def _of_lines(path: Path) -> FileKind:
    with open_data(path) as file:
        line = file.readline(_HEAD * 16).removeprefix(b"\xef\xbb\xbf")
        while line and not line.strip():
            line = file.readline(_HEAD * 16)
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            rest = file.read(_WHOLE)
            try:
                json.loads(line + rest)
            except (ValueError, RecursionError):
                return FileKind("JSON lines of records", "records")  # the reader names what is broken
            return FileKind(
                "one JSON object over several lines",
                None,
                f"write one object a line: jq -c . {path} > records.jsonl",
            )
    if "conversations" in value:
        return FileKind("JSON lines of LLaVA-instruct", "llava-instruct", _convert("llava-instruct", path))
    if "messages" in value:
        return FileKind("JSON lines of messages", "messages", _convert("messages", path))
    return FileKind("JSON lines of records", "records")
