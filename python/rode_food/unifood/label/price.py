"""Tokens and money: estimated before a request, counted after it, and kept below a budget."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rode_food.unifood.label.prompt import resized, text_of
from rode_food.unifood.label.settings import LabelSettings

_BYTES_PER_TOKEN = 4
"""Of English text and JSON, roughly."""
_MESSAGE_TOKENS = 16
"""What roles and separators of a conversation take, at most."""
_TOKENS_PER_INGREDIENT = 45
_TOKENS_PER_MICRONUTRIENTS = 80


def image_tokens(width: int, height: int, settings: LabelSettings) -> int:
    """Tokens of a picture whose file is `width` x `height` pixels.

    gpt-4o's rule, as OpenAI documents it: into 2048 x 2048, the shortest side down to 768, then 170 tokens for each tile
    of 512 x 512 and 85 besides; 85 in all at low detail.
    """
    if settings.tokens_per_image is not None:
        return settings.tokens_per_image
    if settings.image_detail == "low":
        return 85
    width, height = resized(width, height, min(settings.image_side, 2048))
    scale = min(1.0, 768 / min(width, height))
    tiles = math.ceil(width * scale / 512) * math.ceil(height * scale / 512)
    return 85 + 170 * tiles


@dataclass(frozen=True)
class Estimate:
    """Tokens of one request before it is sent.

    Attributes:
        prompt: what it will about be.
        prompt_at_most: a token of a byte-level vocabulary is a byte at least.
        answer: for so many ingredients.
    """

    prompt: int
    prompt_at_most: int
    answer: int


def estimate(
    lines: Sequence[str],
    size: tuple[int, int],
    settings: LabelSettings,
    failed: tuple[str, Sequence[str]] | None = None,
) -> Estimate:
    """Tokens of asking about `lines` and a picture of `size` pixels; `failed` as in `prompt.request_body`."""
    text = len(text_of(lines, failed, settings).encode())
    picture = image_tokens(*size, settings)
    each = _TOKENS_PER_INGREDIENT + (_TOKENS_PER_MICRONUTRIENTS if settings.micronutrients else 0)
    return Estimate(
        picture + math.ceil(text / _BYTES_PER_TOKEN),
        picture + text + _MESSAGE_TOKENS,
        min(10 + each * len(lines), settings.max_tokens),
    )


def price(prompt_tokens: float, answer_tokens: float, settings: LabelSettings) -> float:
    """The price of so many tokens; 0 where no prices are set."""
    paid = prompt_tokens * (settings.price_input or 0.0) + answer_tokens * (settings.price_output or 0.0)
    return paid / 1e6 * settings.price_factor


def price_at_most(tokens: Estimate, settings: LabelSettings) -> float:
    return price(tokens.prompt_at_most, settings.max_tokens, settings)


def usage_of(
    raw: dict[str, Any], answer: str, asked: Estimate, settings: LabelSettings
) -> tuple[int, int, bool]:
    """Tokens of prompt and answer as the reply counts them, else estimated; and whether they are estimated."""
    usage = raw.get("usage")
    if isinstance(usage, dict):
        prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if (
            isinstance(prompt, int)
            and isinstance(completion, int)
            and min(prompt, completion) >= 0
            and max(prompt, completion) > 0
        ):
            return prompt, completion, False
    return asked.prompt, min(math.ceil(len(answer.encode()) / _BYTES_PER_TOKEN), settings.max_tokens), True


class Budget:
    """Money spent and money that requests under way may still cost. Safe to use from several threads."""

    def __init__(self, limit: float | None, spent: float = 0.0) -> None:
        self.limit = limit
        self.spent = spent
        self.reserved = 0.0
        self._lock = threading.Lock()

    def reserve(self, at_most: float) -> bool:
        """Sets the money aside; False if it is not there."""
        with self._lock:
            # a billionth: sums of floats
            if self.limit is not None and self.spent + self.reserved + at_most > self.limit * (1 + 1e-9):
                return False
            self.reserved += at_most
            return True

    def settle(self, reserved: float, spent: float) -> None:
        """The request for which `reserved` was set aside has ended and cost `spent`."""
        with self._lock:
            self.reserved -= reserved
            self.spent += spent

    @property
    def left(self) -> float | None:
        return None if self.limit is None else self.limit - self.spent
