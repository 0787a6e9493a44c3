"""Messages of a conversation, whatever their format, as turns of a record."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from rode_food.readers.common import Broken, shown
from rode_food.records import PICTURE_MARK, Turn

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
"""Name of a speaker -> role."""

# as LLaVA's files have them: marks with a line's end each, before or after the text
_BEFORE = re.compile(rf"(?:{PICTURE_MARK}(?:\n| (?=\S))?)+")
_AFTER = re.compile(rf"(?:(?:\n|(?<=\S) )?{PICTURE_MARK})+\Z")

Note = Callable[[str], None]
"""Counts something odd about an entry that is kept."""


class Said(NamedTuple):
    """One message: role, text with its marks, and pictures that stand beside the text."""

    role: str
    text: str
    pictures: int = 0
    pictures_first: bool = True


def role_of(name: object) -> str:
    """Raises Broken for a speaker that is not known."""
    if not isinstance(name, str) or name.lower() not in ROLES:
        raise Broken("an unknown speaker", shown(name))
    return ROLES[name.lower()]


def turns_of(messages: Sequence[Said], pictures: int, note: Note) -> tuple[Turn, ...]:
    """The turns of a conversation: questions without marks of pictures, each with its answer.

    Args:
        messages: in their order.
        pictures: how many the entry has.
        note: is told what is kept in another form.

    Raises:
        Broken: the messages are no questions with answers in turn, or a text is empty.
    """
    messages = list(messages)
    system = []
    while messages and messages[0].role == "system":
        if (text := messages.pop(0).text).strip():
            system.append(text)
    if messages and messages[-1].role == "user":
        messages.pop()
        note("a last question without an answer, left out")
    want = ["user", "assistant"] * ((len(messages) + 1) // 2)
    if [message.role for message in messages] != want[: len(messages)]:
        raise Broken("speakers out of turn", ", ".join(message.role for message in messages))
    if not messages:
        raise Broken("no answered question")
    marks = sum(message.pictures + message.text.count(PICTURE_MARK) for message in messages)
    if marks and not pictures:
        raise Broken("a picture's mark, and no picture")
    if marks not in (0, pictures):
        note("another number of marks than of pictures")
    turns = []
    for number, (asked, told) in enumerate(zip(messages[::2], messages[1::2], strict=True)):
        if told.pictures or PICTURE_MARK in told.text:
            raise Broken("a picture in an answer", shown(told.text))
        if number and (asked.pictures or PICTURE_MARK in asked.text):
            note("a picture shown in a later turn, now before the first")
        turns.append(Turn(_without_marks(asked, note), told.text))
    if system:
        note("a system message, now before the first question")
        turns[0] = Turn("\n\n".join([*system, turns[0].question]), turns[0].answer)
    if not all(text.strip() for turn in turns for text in (turn.question, turn.answer)):
        raise Broken("an empty question or answer")
    return tuple(turns)


def _without_marks(message: Said, note: Note) -> str:
    text = message.text
    if PICTURE_MARK in text:
        text = _AFTER.sub("", _BEFORE.sub("", text, count=1) if _BEFORE.match(text) else text)
    if PICTURE_MARK in text or (message.pictures and not message.pictures_first):
        note("a picture inside the text, now before it")
        text = text.replace(PICTURE_MARK, "").strip()
    return text
