"""Examples that cannot be used, found before the first step: each by a check that says what is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import islice

import numpy as np
import torch
from PIL import Image

from rode.vlm.features import PictureShape
from rode.vlm.images import image_problems
from rode.vlm.prompts import Features, Picture, PromptEncoder, refuse_half_characters
from rode.vlm.token_bound import tokens_per_byte
from rode_food import Example
from rode_food.data_mixture import DataMixture
from rode_food.file_examples import FileExamples
from rode_food.images import picture_size
from rode_food.shards.examples import ShardExamples

logger = logging.getLogger(__name__)
_MARGIN = (
    64  # tokens by which an estimate may be wrong: more than a prompt's words and what joins of texts change
)
_SIZES = ((64, 64), (1600, 320), (320, 1600), (2000, 2000))
"""Of pictures; one that took different numbers of tokens for some sizes would for two of these."""
_TOGETHER = 1024  # examples whose answers are encoded at once

Check = Callable[[Example], str | None]
"""Takes an example and returns what makes it unusable, in words, or None."""


def empty_texts(example: Example) -> str | None:
    """A check: question and answer hold more than white space."""
    for name in ("question", "answer"):
        if not getattr(example, name).strip():
            return f"task {example.task}: the {name} is empty"
    return None


def unreadable_pictures(examples: Iterable[Example]) -> Check:
    """A check that knows which pictures of these examples cannot be opened: each of them is decoded once, now."""
    return _picture_check(image_problems(image for example in examples for image in example.images))


def _picture_check(problems: Mapping[str, str]) -> Check:
    def check(example: Example) -> str | None:
        return next((problems[image] for image in example.images if image in problems), None)

    return check


class Encodable:
    """A check that an example becomes a row: its texts can be encoded, its prompt and pictures fit `max_length`, the row fits the
    model's positions, and the family takes it as it is.

    Pictures are looked at by their size alone: how many tokens they take depends on nothing else. Where it does not depend on
    the size either, as LLaVA's, they are not opened.

    Args:
        encoder: of the model.
        shape: of pictures, see `rode.vlm.features.PixelSource`.
        pool: stored features of which each stands for so many by so many patches (`rode.vlm.features.FeatureSource`).
        positions: of the model (`rode.vlm.load.positions_of`); None for no limit.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        shape: PictureShape = "processor",
        pool: int = 1,
        positions: int | None = None,
    ) -> None:
        self.encoder, self.shape, self.pool, self.positions = encoder, shape, pool, positions
        limits = [limit for limit in (encoder.max_length, positions) if limit is not None]
        self.limit = min(limits, default=None)
        self._taken = lru_cache(maxsize=4096)(self._tokens_of)
        self._size = lru_cache(maxsize=4096)(picture_size)
        self._answers: dict[str, int] = {}

    def prepare(self, examples: Sequence[Example]) -> None:
        """Encode the answers of examples that will be checked next, all at once."""
        answers = [answer for answer in dict.fromkeys(e.answer for e in examples) if _is_whole(answer)]
        rows = self.encoder.tokenizer(answers, return_attention_mask=False).input_ids if answers else []
        self._answers = dict(zip(answers, map(len, rows), strict=True))

    def _stand_in(self, size: tuple[int, int]) -> Picture:
        blank = Image.new("RGB", size)
        if self.pool == 1:
            return blank
        ids = self.encoder.encode_prompt("?", [blank]).input_ids
        return Features(torch.zeros(1, 1), ids.count(self.encoder.image_token_id or -1) // self.pool**2)

    def _tokens_of(self, size: tuple[int, int]) -> int:
        """Tokens that a picture of this size adds to a prompt."""
        prompt = self.encoder.encode_prompt("?", [self._stand_in(size)])
        return prompt.prompt_length - self.encoder.text_length("?")

    @cached_property
    def _fixed(self) -> int | None:
        """Tokens of a picture where all take as many; None where they depend on its size."""
        found = {self._taken(size) for size in _SIZES}
        return found.pop() if len(found) == 1 else None

    def __call__(self, example: Example) -> str | None:
        try:
            return self._problem(example)
        except (OSError, ValueError) as error:
            return f"task {example.task}: {error}"
        except Exception as error:  # a tokenizer's own
            return f"task {example.task}: it cannot be encoded ({type(error).__name__}: {error})"

    def _problem(self, example: Example) -> str | None:
        refuse_half_characters(example.question, "question")
        refuse_half_characters(example.answer, "answer")
        if example.answer not in self._answers:
            self.prepare([example])
        text = self.encoder.text_length(example.question) + self._answers[example.answer]
        needs_picture = not example.images and self.encoder.family.no_picture is not None
        if not needs_picture and (
            self.limit is None or text + self._picture_tokens(example) + _MARGIN < self.limit
        ):
            return None
        sizes = self._sizes(example)
        row = self.encoder.encode(example.question, example.answer, [self._stand_in(s) for s in sizes])
        if self.positions is not None and len(row.input_ids) > self.positions:
            return (
                f"task {example.task}: {len(row.input_ids)} tokens, and the model has positions for {self.positions}; set "
                f"training.max_length to at most {self.positions}, which cuts answers"
            )
        return None

    def surely_fit(self, examples: FileExamples) -> np.ndarray:
        """Whether each example passes by the size of its texts alone: no text has more tokens than its bytes can make. Of the
        others nothing is known."""
        factor = tokens_per_byte(self.encoder.tokenizer)
        pictures = examples.n_pictures
        fits = ~examples.doubtful_texts
        if self.encoder.family.no_picture is not None:
            fits &= pictures > 0
        if self.limit is None:
            return fits
        if factor is None or (self._fixed is None and pictures.any()):
            return np.zeros(len(examples), bool)
        tokens = self.encoder.text_length("?") + factor * examples.bytes.astype(np.int64)
        return np.asarray(fits & (tokens + pictures * (self._fixed or 0) + _MARGIN < self.limit))

    def _sizes(self, example: Example) -> list[tuple[int, int]]:
        sizes = [self._size(image) for image in example.images]
        return [(max(size), max(size)) for size in sizes] if self.shape == "pad" else sizes

    def _picture_tokens(self, example: Example) -> int:
        if self._fixed is not None:
            return len(example.images) * self._fixed
        return sum(map(self._taken, self._sizes(example)))


def _is_whole(text: str) -> bool:
    try:
        refuse_half_characters(text, "text")
    except ValueError:
        return False
    return True


def split_unusable(examples: Iterable[Example], checks: Sequence[Check]) -> tuple[list[int], list[str]]:
    """Find the examples that a check objects to; the first that does is heard.

    Returns:
        Their numbers, and one line per record and problem.
    """
    numbers: list[int] = []
    lines: dict[str, None] = {}
    number = 0
    following = iter(examples)
    while chunk := list(islice(following, _TOGETHER)):
        for check in checks:
            if isinstance(check, Encodable):
                check.prepare(chunk)
        for example in chunk:
            problem = next(filter(None, (check(example) for check in checks)), None)
            if problem is not None:
                numbers.append(number)
                lines[f"record {example.record_id}: {problem}"] = None
            number += 1
    return numbers, list(lines)


def drop_unusable(
    examples: Sequence[Example], checks: Sequence[Check] = (), on_bad_record: str = "error"
) -> tuple[list[Example], list[str]]:
    """Split off the examples that cannot be used.

    Args:
        examples: their pictures are decoded, each once; question and answer must not be empty.
        checks: further checks.
        on_bad_record: "error" raises at the first problem, "skip" leaves the examples out that have one.

    Returns:
        The usable examples in their order, and one line per record and problem.

    Raises:
        ValueError: an example cannot be used, and `on_bad_record` is "error"; names the record.
    """
    _check_choice(on_bad_record)
    bad, lines = split_unusable(examples, [empty_texts, unreadable_pictures(examples), *checks])
    _raise_for(lines, on_bad_record)
    left_out = set(bad)
    return [example for number, example in enumerate(examples) if number not in left_out], lines


def usable(
    mixture: DataMixture[Example], on_bad_record: str, checks: Sequence[Check] = ()
) -> tuple[DataMixture[Example], list[str]]:
    """`drop_unusable` for each source of a mixture. Records and pictures in shards were read when the shards were written, so
    they are read again only for further `checks`.

    Raises:
        ValueError: as `drop_unusable`; also where no example is left.
    """
    _check_choice(on_bad_record)
    parts: list[Sequence[Example]] = []
    skipped: list[str] = []
    for part in mixture.parts():
        if isinstance(part, FileExamples):
            bad, lines = _unusable_in_file(part, checks)
            _raise_for(lines, on_bad_record)
            part = part.without(bad)
        elif not isinstance(part, ShardExamples):
            part, lines = drop_unusable(part, checks, on_bad_record)
        elif checks:
            bad, lines = split_unusable(part, checks)
            _raise_for(lines, on_bad_record)
            part = part.without(bad)
        else:
            lines = []
        skipped += lines
        parts.append(part)
    for line in skipped:
        logger.warning("left out: %s", line)
    if skipped and not any(parts):
        raise ValueError(f"no example left to train on: {len(skipped)} problems left all of them out")
    return mixture.with_parts(parts), skipped


def _unusable_in_file(examples: FileExamples, checks: Sequence[Check]) -> tuple[list[int], list[str]]:
    """`split_unusable` for a large file: its pictures are decoded, each once, and the examples in doubt by their sizes are read."""
    problems = image_problems(examples.pictures())
    doubtful = examples.doubtful_texts | examples.show_any(problems)
    for check in checks:
        doubtful |= ~check.surely_fit(examples) if isinstance(check, Encodable) else True
    numbers = np.flatnonzero(doubtful).tolist()
    checks = [empty_texts, _picture_check(problems), *checks]
    bad, lines = split_unusable((examples[number] for number in numbers), checks)
    return [numbers[number] for number in bad], lines


def _check_choice(on_bad_record: str) -> None:
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record: expected 'error' or 'skip', got {on_bad_record!r}")


def _raise_for(lines: list[str], on_bad_record: str) -> None:
    if lines and on_bad_record == "error":
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(f"{lines[0]}{more}; mend the record, or set data.on_bad_record=skip")
