"""Rows of other formats as records: LLaVA-instruct entries, and rows with `messages`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rode_food.readers.common import Broken, shown
from rode_food.readers.log import ReadLog
from rode_food.readers.picture_files import PictureFiles
from rode_food.readers.turns import Said, role_of, turns_of
from rode_food.records import SPLITS, FoodRecord, with_images

_OWN = ("id", "image", "images", "source", "split")
_CONTENT = ("type", "text", "image", "path", "url", "image_url")


class Row(NamedTuple):
    """One row: its number in the data from 0, its place, the split that its place implies, and its fields."""

    number: int
    file: Path
    line: int | None
    split: str | None
    value: Mapping[str, Any]


class Rows:
    """Makes records of rows; what cannot be used is left out, and what is kept in another form is noted.

    Args:
        name: the records' source where a row names none.
        pictures: gives pictures their paths.
        log: is told.
    """

    def __init__(self, name: str, pictures: PictureFiles, log: ReadLog) -> None:
        self.name = "data" if name in ("", "all") else name
        self.pictures, self.log = pictures, log
        self._seen: dict[str, int] = {}

    def records(self, rows: Iterable[Row], key: str) -> Iterator[FoodRecord]:
        """The records of rows whose conversation is in the field `key`: "conversations" or "messages"."""
        for row in rows:
            notes: list[str] = []
            try:
                record = self._record(row, key, notes)
            except Broken as error:
                self.log.leave_out_broken(error.reason, file=row.file, line=row.line, detail=error.detail)
                continue
            for reason in notes:
                self.log.note(reason, file=row.file, line=row.line)
            yield record

    def _record(self, row: Row, key: str, notes: list[str]) -> FoodRecord:
        value = row.value
        own = [field for field in ("images", "image") if value.get(field) is not None]
        given = value[own[0]] if own else []
        if len(own) > 1:
            raise Broken("both image and images")
        waiting = list(given) if isinstance(given, list | tuple) else [given]
        messages = value.get(key)
        if not isinstance(messages, list):
            raise Broken(f"no {key}", f"expected a list, got {shown(messages)}")
        if key == "conversations":
            said, shown_pictures = [_said_by(message, notes) for message in messages], waiting
        else:
            said, shown_pictures = _said_in(messages, waiting, notes)
        turns = turns_of(said, len(shown_pictures), notes.append)
        source = value.get("source")
        split = value.get("split")
        for field in value:
            known = field == key or field in _OWN
            odd = (field == "source" and not _is_source(source)) or (field == "split" and split not in SPLITS)
            if value[field] is not None and (not known or odd):
                notes.append(f"a field that records have no place for: {field}")
        record = FoodRecord(
            id=self._id(row, notes),
            image="",
            source=source if isinstance(source, str) and _is_source(source) else self.name,
            split=split if split in SPLITS else row.split,
            conversation=turns,
        )
        return with_images(record, map(self.pictures.path, shown_pictures))

    def _id(self, row: Row, notes: list[str]) -> str:
        given = row.value.get("id")
        name = (
            str(given) if isinstance(given, int | str) and str(given).strip() else f"{self.name}-{row.number}"
        )
        unique = name
        while unique in self._seen:
            self._seen[name] += 1
            unique = f"{name}_{self._seen[name]}"
        if unique != name:
            notes.append("an id that stands twice, now numbered")
        self._seen[unique] = 1
        return unique


def _is_source(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value != "all"


def _said_by(message: object, notes: list[str]) -> Said:
    """A message of LLaVA-instruct."""
    if not isinstance(message, dict):
        raise Broken("a message that is no object", shown(message))
    for field in message:
        if field not in ("from", "value") and message[field] is not None:
            notes.append(f"a field of a message that records have no place for: {field}")
    text = message.get("value")
    if not isinstance(text, str):
        raise Broken("a message that is no text", shown(text))
    return Said(role_of(message.get("from")), text)


def _said_in(messages: list[object], waiting: list[Any], notes: list[str]) -> tuple[list[Said], list[Any]]:
    """Messages with role and content, and their pictures in the order in which they are shown.

    A picture stands in the content itself, or is the next one of those that the row holds.
    """
    said: list[Said] = []
    pictures: list[Any] = []
    waiting = list(waiting)
    for message in messages:
        if not isinstance(message, Mapping):
            raise Broken("a message that is no object", shown(message))
        for field in message:
            if field not in ("role", "content") and message[field]:
                notes.append(f"a field of a message that records have no place for: {field}")
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise Broken("a message without content", shown(content))
        texts: list[str] = []
        shown_here, first = 0, True
        for part in parts:
            text, picture = _part(part, notes)
            if text is not None:
                texts.append(text)
                continue
            first = first and not texts
            shown_here += 1
            if picture is None:
                if not waiting:
                    raise Broken("a picture's mark, and no picture")
                picture = waiting.pop(0)
            pictures.append(picture)
        said.append(Said(role_of(message.get("role")), "\n".join(texts), shown_here, first))
    return said, [*pictures, *waiting]


def _part(part: object, notes: list[str]) -> tuple[str | None, Any]:
    """(text, None) or (None, the picture that stands here, if it does) of a part of a content."""
    if isinstance(part, str):
        return part, None
    if not isinstance(part, Mapping):
        raise Broken("a part of a message that is no object", shown(part))
    kind = part.get("type")
    for field in part:
        if field not in _CONTENT and part[field] is not None:
            notes.append(f"a field of a message that records have no place for: {field}")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise Broken("a message that is no text", shown(text))
        return text, None
    if kind not in ("image", "image_url"):
        raise Broken("a part of a message that is neither text nor image", shown(kind))
    return None, next((part[key] for key in ("image_url", "image", "path", "url") if part.get(key)), None)
