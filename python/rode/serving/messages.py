"""The body of a chat completion: what is asked, of which model, and how."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from rode.serving.choice import Sampling
from rode.serving.errors import ApiError, wrong
from rode.serving.limits import MAX_CHARACTERS, Limits
from rode.serving.pictures import bytes_of
from rode_food import TASKS
from rode_food.records import Turn
from rode_food.tasks import in_context

_MOST_SEED = 2**63 - 1
_LEAST_TEMPERATURE = 0.01  # scores divided by less overflow

_WITHOUT_EFFECT = ("user", "metadata", "safety_identifier")
"""Fields that say who asks, and do not change an answer."""

_ONLY: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "store": (None, False),
    "service_tier": (None, "auto", "default"),
}
"""Fields of OpenAI's that are not supported, with the values under which that makes no difference."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _ImageUrl(_Strict):
    url: str
    detail: Literal["auto"] | None = None


class _Part(_Strict):
    type: Literal["text", "image_url"]
    text: str | None = None
    image_url: _ImageUrl | None = None


class _Message(_Strict):
    role: Literal["user", "assistant"]
    content: str | list[_Part] = Field(union_mode="left_to_right")


class _JsonSchema(_Strict):
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class _ResponseFormat(_Strict):
    type: Literal["text", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class _Body(_Strict):
    model: str
    messages: list[_Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=-_MOST_SEED, le=_MOST_SEED)
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    response_format: _ResponseFormat | None = None
    task: str | None = None


_UNION_STEPS = {"str", "list[_Part]", "list[str]"}
"""Steps of pydantic's locations that are no part of the body."""


@dataclass(frozen=True)
class Question:
    """A request, checked.

    Attributes:
        model: its name. text: the question, with earlier turns before it. pictures: their bytes, and where in the body they stood.
        task: for a router that reads it, and for `schema`. max_tokens: of the answer.
        stops, sampling: see `rode.serving.batch.Job`. schema: of JSON that the answer must be, or None.
        stream: send pieces. usage: send the counts of tokens after them.
    """

    model: str
    text: str
    pictures: tuple[tuple[str, bytes], ...]
    task: str | None
    max_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling | None
    schema: dict[str, Any] | None
    stream: bool
    usage: bool


def parse(data: bytes, limits: Limits) -> Question:
    """A request's body.

    Raises:
        ApiError: what is wrong with it.
    """
    body = _checked(_supported(_json(data)))
    if body.task is not None and body.task not in TASKS:
        raise wrong("task", f"expected one of {', '.join(TASKS)}, got {body.task[:40]!r}")
    text, pictures = _asked(body.messages, limits)
    return Question(
        body.model,
        text,
        pictures,
        body.task,
        _max_tokens(body, limits),
        _stops(body.stop),
        _sampling(body),
        _schema(body.response_format),
        bool(body.stream),
        bool(body.stream_options and body.stream_options.include_usage),
    )


def _json(data: bytes) -> dict[str, Any]:
    try:
        found = from_json(data, allow_inf_nan=False)
    except ValueError as error:  # also for bytes that are no text
        raise ApiError(400, f"the body is not JSON: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body: expected a JSON object, got {type(found).__name__}")
    return found


def _supported(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that have an effect here; a field that would be without one is refused."""
    kept = {}
    for name, value in values.items():
        if name in _ONLY:
            # True == 1 in Python: types count too
            if not any(type(value) is type(only) and value == only for only in _numbers(_ONLY[name])):
                named = " or ".join(repr(only) for only in _ONLY[name] if only is not None)
                raise wrong(name, f"not supported here; leave it out (or {named}), got {_short(value)}")
        elif name in _Body.model_fields:
            kept[name] = value
        elif name not in _WITHOUT_EFFECT:
            raise wrong(name[:80], "no such field is known here; leave it out", code="unknown_parameter")
    return kept


def _numbers(values: tuple[object, ...]) -> list[object]:
    """The values, whole numbers as floats too."""
    more = [float(value) for value in values if type(value) is int]
    return [*values, *more]


def _checked(values: Mapping[str, Any]) -> _Body:
    try:
        return _Body.model_validate(values)
    except ValidationError as error:
        # of a union's members the one that came furthest says what was meant
        worst = max(error.errors(include_url=False, include_context=False), key=lambda e: len(e["loc"]))
    where = ""
    for step in worst["loc"]:
        if isinstance(step, int):
            where += f"[{step}]"
        elif step not in _UNION_STEPS:
            where += f".{step}" if where else step
    if where.endswith(".role") and worst["input"] in ("system", "developer"):
        raise wrong(
            where,
            f"expected 'user' or 'assistant', got {worst['input']!r}: the models are trained without such messages; put "
            "the instruction into the question",
        )
    got = "" if worst["type"] == "missing" else f", got {_short(worst['input'])}"
    said = worst["msg"][0].lower() + worst["msg"][1:]
    raise wrong(where, f"{said}{got}")


def _short(value: object) -> str:
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}..."


def _asked(messages: list[_Message], limits: Limits) -> tuple[str, tuple[tuple[str, bytes], ...]]:
    """The question with the turns before it, and all pictures in their order."""
    texts: list[str] = []
    urls: list[tuple[str, str]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        expected = "user" if index % 2 == 0 else "assistant"
        if message.role != expected:
            raise wrong(
                f"{where}.role",
                f"expected {expected!r}, got {message.role!r}: questions and answers take turns, the question first",
            )
        said, shown = _content(message, where)
        if shown and message.role != "user":
            raise wrong(f"{where}.content", "expected text alone in an answer, got a picture")
        texts.append(said)
        urls += shown
    if len(messages) % 2 == 0:
        raise wrong("messages", "expected a question as the last message, got an answer")
    if len(urls) > limits.max_pictures:
        raise wrong("messages", f"expected at most {limits.max_pictures} pictures, got {len(urls)}")
    if (count := sum(map(len, texts))) > MAX_CHARACTERS:
        raise wrong("messages", f"expected at most {MAX_CHARACTERS:,} characters of text, got {count:,}")
    if not texts[-1].strip():
        raise wrong(f"messages[{len(messages) - 1}].content", "expected a question in words, got none")
    earlier = [Turn(*pair) for pair in zip(texts[:-1:2], texts[1:-1:2], strict=True)]
    return in_context(earlier, texts[-1]), tuple((where, bytes_of(url, where)) for where, url in urls)


def _content(message: _Message, where: str) -> tuple[str, list[tuple[str, str]]]:
    """The text of a message, and the addresses of its pictures with where they stand."""
    if isinstance(message.content, str):
        return message.content, []
    texts: list[str] = []
    urls: list[tuple[str, str]] = []
    for index, part in enumerate(message.content):
        place = f"{where}.content[{index}]"
        value, other = (part.text, part.image_url) if part.type == "text" else (part.image_url, part.text)
        if value is None or other is not None:
            raise wrong(place, f"expected the field {part.type!r} and no other beside type {part.type!r}")
        if isinstance(value, _ImageUrl):
            urls.append((f"{place}.image_url.url", value.url))
        else:
            texts.append(value)
    return "\n".join(texts), urls


def _max_tokens(body: _Body, limits: Limits) -> int:
    given = [n for n in (body.max_tokens, body.max_completion_tokens) if n is not None]
    if len(set(given)) > 1:
        raise wrong(
            "max_tokens", f"expected it or max_completion_tokens, got both: {given[0]} and {given[1]}"
        )
    if not given:
        return min(limits.default_new_tokens, limits.max_new_tokens)
    if given[0] > limits.max_new_tokens:
        name = "max_tokens" if body.max_tokens is not None else "max_completion_tokens"
        raise wrong(name, f"expected at most {limits.max_new_tokens}, got {given[0]}")
    return given[0]


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > 4:
        raise wrong("stop", f"expected at most 4 texts, got {len(stops)}")
    for text in stops:
        if not 1 <= len(text) <= 100:
            raise wrong("stop", f"expected texts of 1 to 100 characters, got one of {len(text)}")
    return stops


def _sampling(body: _Body) -> Sampling | None:
    """None for greedy decoding, which is the default here: adapters are trained to give one answer."""
    temperature, top_p = body.temperature, 1.0 if body.top_p is None else body.top_p
    if temperature is None and top_p < 1.0:
        raise wrong("top_p", "it has an effect only with a temperature above 0, and the default here is 0")
    if not temperature:  # the likeliest tokens: the same with every seed and top_p
        return None
    if temperature < _LEAST_TEMPERATURE:
        raise wrong("temperature", f"expected 0, or {_LEAST_TEMPERATURE} to 2, got {temperature}")
    return Sampling(temperature, top_p, secrets.randbits(63) if body.seed is None else body.seed)


def _schema(response_format: _ResponseFormat | None) -> dict[str, Any] | None:
    if response_format is None:
        return None
    found = response_format.json_schema
    if (found is not None) != (response_format.type == "json_schema"):
        raise wrong(
            "response_format.json_schema",
            f"it goes with type 'json_schema', got type {response_format.type!r}",
        )
    return None if found is None else found.schema_
