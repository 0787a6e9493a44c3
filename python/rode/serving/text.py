"""An answer's text while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"  # what a decoder makes of the first bytes of a character


class AnswerText:
    """Turns tokens into the text that may be shown so far.

    All pieces together are what `rode generate` prints: without control tokens, and without white space at either end. White space,
    halves of characters and what may become a stop string are held back until it is clear what follows.

    Args:
        tokenizer: of the model.
        stops: texts at whose first occurrence the answer ends; they are left out.

    Attributes:
        stopped: a stop string has come.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, tuple(stops), False
        self.ids: list[int] = []
        self._context = self._read = (
            0  # ids from `_context` are decoded together; those before `_read` are in `_text`
        )
        self._text, self._shown = "", 0

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def add(self, token: int) -> str:
        """The piece of text that has become clear with this token, often ""."""
        self.ids.append(token)
        known = self._decode(self.ids[self._context : self._read])
        found = self._decode(self.ids[self._context :])
        if len(found) <= len(known) or found.endswith(_BROKEN):
            return ""
        self._context, self._read = self._read, len(self.ids)
        self._extend(found[len(known) :])
        return self._show(self._clear())

    def finish(self) -> str:
        """The last piece."""
        if not self.stopped:
            whole = self._decode(self.ids)  # decoded in parts, some tokenizers' text differs in white space
            if whole.startswith(self._text[: self._shown]):
                self._text = ""
                self._extend(whole)
        return self._show(len(self._text.rstrip()))

    def _extend(self, piece: str) -> None:
        before = len(self._text)
        self._text += piece
        begins = [
            at for stop in self.stops if (at := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if begins:
            self._text, self.stopped = self._text[: min(begins)], True

    def _clear(self) -> int:
        """How much of the text stays, whatever follows."""
        held = 0
        if not self.stopped:
            for stop in self.stops:
                longest = min(len(stop) - 1, len(self._text))
                held = max(held, *(n for n in range(longest + 1) if self._text.endswith(stop[:n])))
        return len(self._text[: len(self._text) - held].rstrip())

    def _show(self, end: int) -> str:
        if self._shown == 0:  # blanks in front of the answer
            self._shown = len(self._text[:end]) - len(self._text[:end].lstrip())
        piece = self._text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece
