"""A JSON array of objects too large to hold, entry by entry, and past what is broken in it.

The text is scanned by the standard library's C scanner, a buffer at a time. (ijson streams too, but stops for good at the
first bad byte and knows neither line nor offset of what it reads.)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from rode_food.opening import open_data
from rode_food.readers.log import ReadLog
from rode_food.records import RecordError

BUFFER = 1 << 20
MAX_ENTRY = 1 << 23
"""Bytes after which an entry that does not end is given up."""

_SPACE = re.compile(r"[ \t\r\n]*")
# where an entry may begin
_BEGINNING = re.compile(r"[,\[\n][ \t\r\n]*(?=\{)")
_BYTE_ORDER_MARK = "\xef\xbb\xbf"
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_scan = json.JSONDecoder().raw_decode
# of the longest token that raw_decode can find cut off at the buffer's end: \ud83d\ude00, -Infinity
_TOKEN = 16


class Entry(NamedTuple):
    """One object of the array.

    Attributes:
        value: the object.
        line: on which it begins, from 1.
        offset, length: of its bytes in the file.
    """

    value: dict[str, Any]
    line: int
    offset: int
    length: int


def read_json_array(
    path: Path, log: ReadLog, *, keys: tuple[str, ...] = (), buffer_size: int = BUFFER
) -> Iterator[Entry]:
    """Reads the objects of a JSON array in their order; holds one buffer, or one entry where that is larger.

    An entry that is no JSON, no object, or no UTF-8 goes to `log.leave_out_broken` with its line; reading goes on at the
    next place where a whole object with all of `keys` begins, so name keys that no object inside an entry has together.

    Args:
        path: UTF-8, with or without a byte-order mark.
        keys: of every entry.
        buffer_size: bytes read at a time.

    Raises:
        RecordError: if the file holds no array, naming it; if `log.strict`, at the first broken entry.
        FileNotFoundError: there is no such file.
    """
    with open_data(path) as file:
        yield from _Scanner(path, file, log, keys, buffer_size).entries()


class _Scanner:
    """`text` is a window of the file's bytes read as Latin-1: offsets in it are bytes, and what gives JSON its structure
    is ASCII. Strings are decoded again as UTF-8, entry by entry, where they are not ASCII."""

    def __init__(self, path: Path, file: IO[bytes], log: ReadLog, keys: tuple[str, ...], size: int) -> None:
        self.path, self.file, self.log, self.keys, self.size = path, file, log, keys, size
        self.text = ""
        self.start = 0  # offset of the window in the file
        self.at = 0  # where to go on in the window
        self.line, self.counted = 1, 0  # lines are counted up to here in the window
        self.ended = False

    def entries(self) -> Iterator[Entry]:
        while len(self.text) < len(_BYTE_ORDER_MARK) and self.more():
            pass
        self.at = len(_BYTE_ORDER_MARK) if self.text.startswith(_BYTE_ORDER_MARK) else 0
        if self.skip_space() != "[":
            raise RecordError(
                f"{self.path}: expected a JSON array, got {self.shown(self.at, self.at + 20)!r}"
            )
        self.at += 1
        after_entry = False
        while True:
            character = self.skip_space()
            if after_entry and character == ",":
                self.at += 1
                character, after_entry = self.skip_space(), False
                if character == "]":
                    self.broken("invalid JSON", "a comma without an entry")
            if character == "]":
                self.at += 1
                if not self.skip_space():
                    return
                # the bracket may be that of a list in an entry whose beginning is lost
                self.broken("invalid JSON", "text after the end of the array")
            elif not character:
                self.broken("a file cut short", "the array is not closed")
                return
            elif after_entry:
                self.broken(
                    "invalid JSON", f"no comma between entries, but {self.shown(self.at, self.at + 20)!r}"
                )
                if character == "{":
                    after_entry = False
                    continue
            else:
                try:
                    value, end = self.scan()
                except (ValueError, RecursionError) as error:
                    self.broken("invalid JSON", getattr(error, "msg", None) or str(error))
                    self.at += 1  # else its own beginning would be found
                else:
                    entry = self.checked(value, end)
                    # a list may be a bracket too many, with all the entries behind in it
                    self.at, after_entry = (self.at, False) if isinstance(value, list) else (end, True)
                    if isinstance(value, list) and not self.find_entry():
                        return
                    if entry is not None:
                        yield entry
                    continue
            if not self.find_entry():
                return
            after_entry = False

    def more(self) -> bool:
        """Drops what is done from the window and lengthens the rest, by no less than its own length: so that an entry of
        any size is scanned a few times only. False at the file's end."""
        if self.ended:
            return False
        self.line_at(self.at)
        rest = self.text[self.at :]
        new = self.file.read(max(self.size, len(rest)))
        self.ended = not new
        self.start += self.at
        self.text, self.at, self.counted = rest + new.decode("latin-1"), 0, 0
        return not self.ended

    def line_at(self, position: int) -> int:
        """The line of a place in the window that is not before the last one asked for."""
        self.line += self.text.count("\n", self.counted, position)
        self.counted = position
        return self.line

    def broken(self, reason: str, detail: str = "") -> None:
        self.log.leave_out_broken(reason, file=self.path, line=self.line_at(self.at), detail=detail)

    def shown(self, begin: int, end: int) -> str:
        return self.text[begin:end].encode("latin-1").decode("utf-8", "replace")

    def after_space(self, position: int) -> int:
        """The place in the window where white space ends, `position` itself where none begins there."""
        match = _SPACE.match(self.text, position)
        assert match is not None, "the pattern matches nothing too"
        return match.end()

    def skip_space(self) -> str:
        """Goes to the next character that is no white space and returns it; "" at the file's end."""
        while True:
            self.at = self.after_space(self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def scan(self) -> tuple[object, int]:
        """(value that begins here, its end). Raises ValueError if there is none, RecursionError if it nests too deep."""
        while True:
            try:
                value, end = _scan(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self.text) - _TOKEN or error.msg.startswith("Unterminated string")
                if not cut or len(self.text) - self.at > MAX_ENTRY or not self.more():
                    raise
            else:
                length = end - self.at
                if end < len(self.text) or not self.more():  # a number may go on in the next buffer
                    return value, self.at + length

    def checked(self, value: object, end: int) -> Entry | None:
        """The entry from here to `end`, decoded; None, and the log told, if it cannot be."""
        line = self.line_at(self.at)
        if not isinstance(value, dict):
            self.broken("an entry that is no object", self.shown(self.at, min(end, self.at + 40)))
            return None
        raw = self.text[self.at : end].encode("latin-1")
        try:
            decoded: dict[str, Any] = value if raw.isascii() else json.loads(raw.decode("utf-8"))
            if _SURROGATE.search(raw):  # half of a pair is a str that cannot be written again
                json.dumps(decoded, ensure_ascii=False).encode("utf-8")
        except UnicodeDecodeError as error:
            self.broken("invalid UTF-8", f"{error.reason} at byte {self.start + self.at + error.start}")
            return None
        except UnicodeEncodeError:
            self.broken("invalid UTF-16", "half a surrogate pair in a \\u escape")
            return None
        return Entry(decoded, line, self.start + self.at, end - self.at)

    def find_entry(self) -> bool:
        """Goes to the next place where an entry begins, or to the array's end; False if the file ends before."""
        while True:
            match = _BEGINNING.search(self.text, self.at)
            if match is None:
                # the end of the window may hold the comma and the white space before a brace that is to come
                self.at = max(self.at, len(self.text.rstrip(" \t\r\n")) - 1)
                if not self.more():
                    return self.text[self.at : self.at + 1] == "]"
                continue
            self.at = match.end()
            try:
                value, end = self.scan()
            except (ValueError, RecursionError):
                self.at += 1
                continue
            if isinstance(value, dict) and all(key in value for key in self.keys) and self.followed(end):
                return True
            self.at += 1

    def followed(self, end: int) -> bool:
        """Does a comma, the array's end or the file's end come next?"""
        while True:
            position = self.after_space(end)
            if position < len(self.text):
                return self.text[position] in ",]"
            length = end - self.at
            if not self.more():
                return True
            end = self.at + length
