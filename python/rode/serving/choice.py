"""How the next token of each row of a batch is picked: greedily, at random, or within a JSON schema."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper

from rode.serving.errors import ApiError, wrong

_COMPACT = {"whitespace_flexible": False}  # else a model may write blanks until its tokens run out
_MOST_SCHEMA = 50_000  # characters


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: above 0. top_p: tokens that together have so much probability take part. seed: of the draws.
    """

    temperature: float
    top_p: float
    seed: int

    def draws(self, device: torch.device) -> torch.Generator:
        return torch.Generator(device).manual_seed(self.seed)

    def pick(self, scores: Tensor, generator: torch.Generator) -> Tensor:
        """A token (1, 1) by scores (1, vocabulary)."""
        scores = TemperatureLogitsWarper(self.temperature)(None, scores)
        if self.top_p < 1.0:
            scores = TopPLogitsWarper(self.top_p)(None, scores)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)


class Grammars:
    """Makes what holds an answer within a JSON schema, for one model.

    Args:
        tokenizer: of the model. ends: the tokens that end an answer. vocabulary: entries of the model's logits.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int], vocabulary: int) -> None:
        self._parts = (tokenizer, list(ends), vocabulary)
        self._made: LLTokenizer | None = None
        self._lock = threading.Lock()

    def _tokenizer(self) -> LLTokenizer:
        with self._lock:  # made when it is first needed: it takes a second
            if self._made is None:
                tokenizer, ends, vocabulary = self._parts
                try:
                    self._made = from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=ends)
                except ValueError as error:
                    raise ApiError(
                        400, f"response_format: this model's tokenizer cannot be held to a schema: {error}"
                    ) from None
            return self._made

    def matcher(self, schema: dict[str, Any], param: str) -> LLMatcher:
        """The state of one answer.

        Raises:
            ApiError: the schema cannot be kept to, and why.
        """
        text = json.dumps(schema)
        if len(text) > _MOST_SCHEMA:
            raise wrong(
                param, f"expected at most {_MOST_SCHEMA:,} characters of JSON schema, got {len(text):,}"
            )
        grammar = LLMatcher.grammar_from_json_schema(text, overrides=_COMPACT)  # type: ignore[arg-type]
        limits = LLParserLimits(verbose_errors=False)
        matcher = LLMatcher(self._tokenizer(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            why = " ".join(matcher.get_error().split())[:300]
            raise wrong(param, f"expected a JSON schema that can be kept to, got one with: {why}")
        return matcher

    def accepts(self, matcher: LLMatcher, text: str) -> bool:
        """Whether a text is a whole answer of a fresh matcher's schema."""
        tokens = self._tokenizer().tokenize_str(text)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


class Row:
    """The way in which one row picks its tokens.

    Args:
        sampling: None for the likeliest token. matcher: of a schema, or None.
    """

    def __init__(self, sampling: Sampling | None, matcher: LLMatcher | None, device: torch.device) -> None:
        self.sampling, self.matcher = sampling, matcher
        self.generator = None if sampling is None else sampling.draws(device)
        self.done = False

    def pick(self, scores: Tensor) -> None:
        """Leaves in scores (1, vocabulary) what may come; of a row that draws, the token that it drew alone."""
        if self.done:
            return
        if self.matcher is not None:
            allowed = torch.frombuffer(bytearray(self.matcher.compute_logit_bias()), dtype=torch.uint8)
            closed = allowed[: scores.shape[-1]] == 0
            scores[:, : len(closed)].masked_fill_(closed.to(scores.device), -torch.inf)
            scores[:, len(closed) :] = -torch.inf
        if self.sampling is not None and self.generator is not None:
            token = self.sampling.pick(scores.clone(), self.generator)
            scores.fill_(-torch.inf).scatter_(-1, token, 0.0)


class Choice(LogitsProcessor):
    """The rows of a batch, for a `generate` that takes each row's largest score."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    @property
    def is_needed(self) -> bool:
        return any(row.sampling is not None or row.matcher is not None for row in self.rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        for index, row in enumerate(self.rows):
            row.pick(scores[index : index + 1])
        return scores
