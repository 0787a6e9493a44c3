"""One call of `generate` for several requests to the same model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from rode.serving.choice import Choice, Row, Sampling
from rode.serving.errors import ApiError
from rode.serving.text import AnswerText
from rode.vlm.head import contiguous_head_input

if TYPE_CHECKING:
    from llguidance import LLMatcher
    from torch import Tensor

    from rode.serving.models import Prepared, ServedModel
    from rode.vlm.prompts import Encoded


@dataclass(frozen=True)
class Piece:
    """A piece of an answer's text, "" for a token that shows nothing yet."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The end of an answer.

    Attributes:
        reason: "stop" or "length".
        prompt_tokens, tokens: of the prompt with its pictures, and of the answer with its end.
    """

    reason: str
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Failed:
    """An answer that does not come."""

    error: ApiError


Event = Piece | Finished | Failed


@dataclass(eq=False)
class Job:
    """A request in the queue.

    Attributes:
        model: which is asked. prepared: what it is asked.
        max_tokens: of the answer. stops: texts that end it.
        sampling: None for the likeliest tokens. matcher: of a JSON schema, or None.
        emit: told of what happens, from the thread that owns the model; the last event is `Finished` or `Failed`.
        cancelled: set when nobody waits for the answer any more.
        tokens: of the answer, so far.
    """

    model: ServedModel
    prepared: Prepared
    max_tokens: int
    emit: Callable[[Event], None]
    stops: tuple[str, ...] = ()
    sampling: Sampling | None = None
    matcher: LLMatcher | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    tokens: int = 0


class _Answer:
    """One row of a running batch."""

    def __init__(self, job: Job, row: Encoded, device: torch.device) -> None:
        self.job, self.prompt_tokens = job, len(row.input_ids)
        self.text = AnswerText(job.model.text_tokenizer, job.stops)
        self.choice = Row(job.sampling, job.matcher, device)
        self.done = False

    def take(self, token: int) -> None:
        """The next token; `done` says whether the answer goes on."""
        if self.done:
            return
        job = self.job
        if job.cancelled.is_set():
            self._end()
            return
        job.tokens += 1
        matcher = job.matcher
        if matcher is not None and not matcher.consume_token(token):
            self._end(Failed(ApiError(500, "the answer could not be held to response_format")))
            return
        if token in job.model.ends:
            self._finish("stop")
            return
        job.emit(Piece(self.text.add(token)))
        if self.text.stopped:
            self._finish("stop")
        elif job.tokens >= job.max_tokens:
            self._finish("length")

    def _finish(self, reason: str) -> None:
        job, last = self.job, self.text.finish()
        if last:
            job.emit(Piece(last))
        self._end(Finished(reason, self.prompt_tokens, job.tokens))

    def _end(self, event: Event | None = None) -> None:
        self.done = self.choice.done = True
        if event is not None:
            self.job.emit(event)


class _Answers(StoppingCriteria):
    """Hands each row its tokens, and tells `generate` which rows have ended."""

    def __init__(self, answers: Sequence[_Answer]) -> None:
        self.answers = answers

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        for answer, token in zip(self.answers, input_ids[:, -1].tolist(), strict=True):
            answer.take(token)
        return torch.tensor([answer.done for answer in self.answers], device=input_ids.device)


@torch.inference_mode()
def run(jobs: Sequence[Job]) -> None:
    """Answer requests to one model together. A request that cannot be asked at all is told so, and the others are answered."""
    served = jobs[0].model
    ready: list[tuple[Job, Encoded]] = []
    with served.active() as model:
        for job in jobs:
            try:
                row = served.row(job.prepared)
                served.check_length(row, job.max_tokens)
            except ApiError as error:
                job.emit(Failed(error))
            else:
                ready.append((job, row))
        if not ready:
            return
        answers = [_Answer(job, row, model.device) for job, row in ready]
        batch = served.batch([job.prepared for job, _ in ready], [row for _, row in ready])
        choice = Choice([answer.choice for answer in answers])
        longest = max(job.max_tokens for job, _ in ready)
        with contiguous_head_input(model):
            model.generate(
                **batch,
                generation_config=served.settings(longest),
                logits_processor=LogitsProcessorList([choice] if choice.is_needed else []),
                stopping_criteria=StoppingCriteriaList([_Answers(answers)]),
            )
