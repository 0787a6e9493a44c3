"""Examples that cannot be used, found before the first step: each by a check that says what is wrong with it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

import torch
from PIL import Image

from rode.vlm.features import PictureShape
from rode.vlm.images import image_problems
from rode.vlm.prompts import Features, Picture, PromptEncoder
from rode_food import Example
from rode_food.data_mixture import DataMixture
from rode_food.images import picture_size
from rode_food.shards.examples import ShardExamples

logger = logging.getLogger(__name__)
_MARGIN = (
    64  # tokens by which an estimate may be wrong: more than a prompt's words and what joins of texts change
)

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
    problems = image_problems(image for example in examples for image in example.images)

    def check(example: Example) -> str | None:
        return next((problems[image] for image in example.images if image in problems), None)

    return check


def encodable(encoder: PromptEncoder, shape: PictureShape = "processor", pool: int = 1) -> Check:
    """A check that an example becomes a row: its prompt and pictures fit `max_length`, and the family takes it as it is.

    Pictures are looked at by their size alone: how many tokens they take depends on nothing else. With `pool` they are
    stored features of which each stands for so many by so many patches (`rode.vlm.features.FeatureSource`).
    """

    def stand_in(size: tuple[int, int]) -> Picture:
        blank = Image.new("RGB", size)
        if pool == 1:
            return blank
        ids = encoder.encode_prompt("?", [blank]).input_ids
        return Features(torch.zeros(1, 1), ids.count(encoder.image_token_id or -1) // pool**2)

    expansions: dict[tuple[int, int], int] = {}

    def taken(size: tuple[int, int]) -> int:
        """Tokens that a picture of this size adds to a prompt."""
        if size not in expansions:
            prompt = encoder.encode_prompt("?", [stand_in(size)])
            expansions[size] = prompt.prompt_length - encoder.text_length("?")
        return expansions[size]

    def check(example: Example) -> str | None:
        if encoder.max_length is None and (example.images or encoder.family.no_picture is None):
            return None
        try:
            sizes = [picture_size(image) for image in example.images]
            if shape == "pad":
                sizes = [(max(size), max(size)) for size in sizes]
            text = encoder.text_length(example.question) + len(encoder.tokenizer(example.answer).input_ids)
            if sizes and text + sum(map(taken, sizes)) + _MARGIN < (encoder.max_length or 0):
                return None
            encoder.encode(example.question, example.answer, [stand_in(size) for size in sizes])
        except (OSError, ValueError) as error:
            return f"task {example.task}: {error}"
        return None

    return check


def split_unusable(examples: Sequence[Example], checks: Sequence[Check]) -> tuple[list[int], list[str]]:
    """Find the examples that a check objects to; the first that does is heard.

    Returns:
        Their numbers, and one line per record and problem.
    """
    numbers: list[int] = []
    lines: dict[str, None] = {}
    for number, example in enumerate(examples):
        problem = next(filter(None, (check(example) for check in checks)), None)
        if problem is not None:
            numbers.append(number)
            lines[f"record {example.record_id}: {problem}"] = None
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
        if not isinstance(part, ShardExamples):
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


def _check_choice(on_bad_record: str) -> None:
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record: expected 'error' or 'skip', got {on_bad_record!r}")


def _raise_for(lines: list[str], on_bad_record: str) -> None:
    if lines and on_bad_record == "error":
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ValueError(f"{lines[0]}{more}; mend the record, or set data.on_bad_record=skip")
