"""Clients of `rode serve`, for a process of their own: they take no time from the server's interpreter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any, NamedTuple


class Answered(NamedTuple):
    """One request as its client saw it.

    Attributes:
        number: of the question. first, seconds: until the first token, and until the last. text, tokens: of the answer.
    """

    number: int
    first: float
    seconds: float
    text: str
    tokens: int


def ask_all(
    address: str, model: str, messages: Sequence[Any], clients: int, tokens: int
) -> tuple[float, list[Answered]]:
    """All questions by so many clients, each of which asks its next one when it has an answer; the seconds that took."""
    return asyncio.run(_ask_all(address, model, messages, clients, tokens))


async def _ask_all(
    address: str, model: str, messages: Sequence[Any], clients: int, tokens: int
) -> tuple[float, list[Answered]]:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await client.models.list()
        left = iter(enumerate(messages))
        answers: list[Answered] = []

        async def one() -> None:
            for number, asked in left:
                started, first, text, count = time.perf_counter(), None, "", 0
                stream = await client.chat.completions.create(
                    model=model,
                    messages=asked,
                    max_tokens=tokens,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for chunk in stream:
                    first = time.perf_counter() if first is None else first
                    if chunk.choices:
                        text += chunk.choices[0].delta.content or ""
                    if chunk.usage:
                        count = chunk.usage.completion_tokens
                assert first is not None, "an answer without events"
                answers.append(Answered(number, first - started, time.perf_counter() - started, text, count))

        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        return time.perf_counter() - began, sorted(answers)
