"""What is sent back: OpenAI's objects, and an adapter's trained answer as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from rode.serving.batch import Finished
from rode_food.tasks import parse_answer

JSON_TASKS = ("nutrition", "ingredients")
"""Tasks whose trained answers are read into JSON when `task` and a schema are given."""


class Completion:
    """Makes the objects of one answer.

    Args:
        key: a name of its own. model: that was asked.
    """

    def __init__(self, key: str, model: str) -> None:
        self._common = {"id": f"chatcmpl-{key}", "created": int(time.time()), "model": model}

    @staticmethod
    def _usage(end: Finished) -> dict[str, int]:
        return {
            "prompt_tokens": end.prompt_tokens,
            "completion_tokens": end.tokens,
            "total_tokens": end.prompt_tokens + end.tokens,
        }

    def whole(self, text: str, end: Finished) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.reason}
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": self._usage(end),
        }

    def chunk(self, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return {**self._common, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self, end: Finished) -> dict[str, Any]:
        return {
            **self._common,
            "object": "chat.completion.chunk",
            "choices": [],
            "usage": self._usage(end),
        }


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def as_json(task: str, text: str, order: Sequence[str] = ()) -> str | None:
    """A trained answer as JSON without white space: an object of the five numbers, or of one list of ingredients.

    Args:
        task: of `JSON_TASKS`. text: the answer.
        order: of the keys; those that it does not name come last.

    Returns:
        The JSON; None if the answer does not say what was asked.
    """
    found = parse_answer(task, text)
    if found is None:
        return None
    values: dict[str, Any] = found if isinstance(found, dict) else {"ingredients": found}
    if isinstance(found, dict):
        # 120.0 as 120: both are the same number, and the second is an integer too
        values = {k: int(v) if v is not None and v == int(v) else v for k, v in found.items()}
    ordered = {key: values[key] for key in (*order, *values) if key in values}
    return json.dumps(ordered, ensure_ascii=False, separators=(",", ":"))
