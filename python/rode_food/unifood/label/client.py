"""Talking to the endpoint: what each failure means, when to try again, and how long to wait."""

from __future__ import annotations

import email.utils
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

from rode_food.unifood.label.errors import LabelError
from rode_food.unifood.label.settings import LabelSettings

if TYPE_CHECKING:
    import openai

T = TypeVar("T")

# 400s that are about one picture or one text, as OpenAI and Azure code them
_RECORD_CODES = {
    "content_filter",
    "content_policy_violation",
    "context_length_exceeded",
    "image_parse_error",
    "image_too_large",
    "image_too_small",
    "invalid_base64",
    "invalid_base64_image",
    "invalid_image",
    "invalid_image_format",
    "invalid_image_url",
    "invalid_prompt",
    "string_above_max_length",
    "unsupported_image_media_type",
}
_JOB_CODES = {
    "account_deactivated",
    "billing_hard_limit_reached",
    "billing_not_active",
    "insufficient_quota",
    "invalid_api_key",
    "invalid_json_schema",
    "missing_required_parameter",
    "model_not_found",
    "unknown_parameter",
    "unsupported_parameter",
    "unsupported_value",
}
# ... and as servers that have no codes put it
_RECORD_WORDS = re.compile(
    r"(?:invalid|unsupported|corrupt\w*|bad|broken|failed to|cannot|can't|could not|couldn't|unable to)\b.{0,40}"
    r"\b(?:image|picture|base64)|"
    r"\b(?:image|picture|base64)\b.{0,40}\b(?:invalid|corrupt|too (?:large|small)|could not|cannot)|"
    r"content (?:management )?policy|safety system|context (?:length|size|window)|exceeds? .{0,40}context|too long",
    re.I,
)
_JOB_WORDS = re.compile(
    r"(?:image|vision|multi-?modal)\w*(?: \w+){0,2} (?:is|are) not supported|not (?:a )?(?:multi-?modal|vision)|"
    r"(?:does not|doesn't|cannot) (?:support|accept|process) (?:image|vision|multi-?modal)|mmproj",
    re.I,
)


@dataclass(frozen=True)
class Fault:
    """The meaning of one failed request.

    Attributes:
        kind: "job": no request can succeed; "record": this content never will; "retry": a later one may;
            "unclear": refused, and nobody says whether for the job's sake or the record's; "picture": it could not be
            read here, so nothing was sent.
        detail: at most a line.
        lost: the request may have been answered, and charged, all the same.
        pause: seconds that the server asks everybody to wait, if it does.
    """

    kind: Literal["job", "record", "retry", "unclear", "picture"]
    detail: str
    lost: bool = False
    pause: float | None = None


class RequestFailed(Exception):
    """Carries the fault of a request that is given up."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.fault = fault


class Stopped(Exception):
    """The job ends; this request was not sent."""


def fault_of_status(status: int, error: object, pause: float | None = None) -> Fault:
    """The meaning of an HTTP status with the server's `error` object (or text)."""
    error = error if isinstance(error, dict) else {"message": error}
    code = str(error.get("code") or "")
    message = error.get("message")
    told = " ".join(str(message if message else json.dumps(error)).split())[:300]
    detail = f"HTTP {status}: {told}"
    kinds = {code, str(error.get("type") or "")}
    if status in (401, 402, 403, 404, 405) or kinds & _JOB_CODES:
        return Fault("job", detail)
    if status in (400, 413, 422):
        if kinds & _RECORD_CODES:
            return Fault("record", detail)
        if _JOB_WORDS.search(told) or str(error.get("param") or "") in (
            "response_format",
            "model",
            "temperature",
        ):
            return Fault("job", detail)
        return Fault("record" if status == 413 or _RECORD_WORDS.search(told) else "unclear", detail)
    if _JOB_WORDS.search(told):  # llama.cpp without a projector answers 500
        return Fault("job", detail)
    if status in (408, 409, 425, 429) or status >= 500:
        return Fault("retry", detail, pause=pause)
    return Fault("unclear", detail)


def retry_after(headers: Mapping[str, str], now: float | None = None) -> float | None:
    """Seconds that Retry-After asks for, as a number or a date (RFC 9110); OpenAI's retry-after-ms goes first."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    return max(0.0, date.timestamp() - (time.time() if now is None else now))


def make_client(settings: LabelSettings) -> openai.OpenAI:
    """The official client.

    Raises:
        ImportError: it is not installed.
        LabelError: OpenAI's own endpoint is meant and there is no key.
    """
    try:
        import openai
    except ImportError:
        raise ImportError("the label stage needs the openai client: pip install 'rode[data]'") from None
    key = os.environ.get(settings.api_key_env) if settings.api_key_env else None
    if not key and (urlsplit(settings.base_url).hostname or "").endswith("openai.com"):
        where = (
            f"set {settings.api_key_env}"
            if settings.api_key_env
            else "name its variable in label.api_key_env"
        )
        raise LabelError(f"no API key for {settings.base_url}: {where}")
    # its own retries are off: they do not know the budget, count no attempts, and wait at most two minutes
    return openai.OpenAI(
        base_url=settings.base_url, api_key=key or "none", timeout=settings.timeout, max_retries=0
    )


class Endpoint:
    """The server, with retries. Used from several threads.

    Attributes:
        stop: once set, waits end and no further request is sent.
    """

    def __init__(self, settings: LabelSettings) -> None:
        self.settings = settings
        self.stop = threading.Event()
        self._not_before = 0.0
        self._random = random.Random()

    @cached_property
    def client(self) -> openai.OpenAI:
        """Made at first use: a full ledger needs neither key nor server. Raises as `make_client` does."""
        return make_client(self.settings)

    def call(
        self,
        send: Callable[[], T],
        *,
        sent: Callable[[], None] = lambda: None,
        failed: Callable[[Fault], None] = lambda fault: None,
    ) -> T:
        """`send()`, again where that may help.

        Args:
            send: one request.
            sent: called before each.
            failed: called after each that failed; what it raises ends the call.

        Raises:
            RequestFailed: with the last fault.
            Stopped: `stop` was set.
        """
        import openai

        for attempt in range(self.settings.retries + 1):
            self._wait_until(self._not_before)
            sent()
            try:
                return send()
            except openai.APIStatusError as error:
                fault = fault_of_status(
                    error.status_code, error.body or error.message, retry_after(error.response.headers)
                )
            except openai.APITimeoutError as error:
                fault = Fault(
                    "retry", f"no answer within {self.settings.timeout:g} s", lost=_may_be_charged(error)
                )
            except openai.APIConnectionError as error:
                fault = Fault("retry", f"connection: {error.__cause__ or error}", lost=_may_be_charged(error))
            except RequestFailed as error:
                fault = error.fault
            failed(fault)
            if fault.kind != "retry":
                raise RequestFailed(fault)
            if fault.pause is not None and fault.pause > self.settings.retry_after_limit:
                told = f"the server asks for a pause of {fault.pause:.0f} s ({fault.detail})"
                raise RequestFailed(Fault("job", told))
            if attempt == self.settings.retries:
                break
            if fault.pause is not None:  # meant for the whole account
                self._not_before = max(self._not_before, time.monotonic() + fault.pause)
            else:
                longest = min(self.settings.backoff * 2.0**attempt, self.settings.backoff_limit)
                self._wait_until(time.monotonic() + self._random.uniform(0.0, longest))
        raise RequestFailed(fault)

    def _wait_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            if self.stop.wait(left):
                break
            moment = max(moment, self._not_before)
        if self.stop.is_set():
            raise Stopped

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """One chat completion as the server's JSON.

        Raises:
            RequestFailed: what came is no chat completion, or says that it failed.
        """
        raw = self.client.chat.completions.with_raw_response.create(**as_arguments(body))
        return check_completion(raw.text)


def as_arguments(body: dict[str, Any]) -> dict[str, Any]:
    """Fields that the client's method may not know (a local server's) travel as `extra_body`."""
    known = ("model", "messages", "max_completion_tokens", "max_tokens", "temperature", "response_format")
    further = {name: value for name, value in body.items() if name not in known}
    arguments = {name: value for name, value in body.items() if name in known}
    return arguments | ({"extra_body": further} if further else {})


def check_completion(text: str | dict[str, Any]) -> dict[str, Any]:
    """The completion out of a body with status 200. Raises RequestFailed."""
    raw: Any = None
    with suppress(ValueError):
        raw = json.loads(text) if isinstance(text, str) else text
    if isinstance(raw, dict) and raw.get("error"):  # some proxies answer 200 with an error inside
        error = raw["error"]
        code = error.get("code") if isinstance(error, dict) else None
        raise RequestFailed(fault_of_status(code if isinstance(code, int) else 500, error))
    try:
        choice = raw["choices"][0]
        message = choice["message"]
        strings = (message.get("content"), message.get("refusal"), choice.get("finish_reason"))
        if isinstance(raw, dict) and all(value is None or isinstance(value, str) for value in strings):
            return raw
    except (TypeError, KeyError, IndexError, AttributeError):
        pass
    told = " ".join(str(text).split())[:100]
    raise RequestFailed(Fault("retry", f"not a chat completion: {told}", lost=True))


def _may_be_charged(error: Exception) -> bool:
    """Unless the connection was never made."""
    return type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout", "PoolTimeout")
