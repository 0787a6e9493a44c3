"""Objects of a JSON array or of JSON lines, gzip'ed or not: whichever a file turns out to hold."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.opening import open_data
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog


def read_json_lines(path: Path, log: ReadLog) -> Iterator[tuple[int, Any]]:
    """(line from 1, value) of lines that are not blank; one that is no UTF-8 or no JSON is broken."""
    with open_data(path) as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if not text:
                    continue
                value = json.loads(text)
                # half a surrogate pair cannot be written again
                json.dumps(value, ensure_ascii=False).encode("utf-8")
            except UnicodeDecodeError as error:
                log.leave_out_broken("invalid UTF-8", file=path, line=number, detail=error.reason)
            except (ValueError, RecursionError) as error:
                detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                log.leave_out_broken("invalid JSON", file=path, line=number, detail=detail)
            else:
                yield number, value


def read_json_rows(path: Path, log: ReadLog, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of an array or of lines; what is no object is broken. `key` is one that every object has."""
    with open_data(path) as file:
        start = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n")[:1]
    if start == b"[":
        for entry in read_json_array(path, log, keys=(key,)):
            yield entry.line, entry.value
        return
    for line, value in read_json_lines(path, log):
        if isinstance(value, dict):
            yield line, value
        else:
            log.leave_out_broken("an entry that is no object", file=path, line=line)
