"""Several questions about one picture behind one prefix: the picture's tokens are computed once for all of them.

A packed row is [prefix, question 1 with answer, question 2 with answer, ...]. Each question sees the prefix and itself, at
the positions it would have alone, so that losses and gradients are those of separate rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rode.vlm.images import E
from rode.vlm.load import input_embeddings
from rode.vlm.prompts import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX, PADDING = 0, -1  # segment numbers; questions have 1, 2, ...


class PackedRow(NamedTuple):
    """Four lists of one length: token ids, segment of each, position of each, and whether it is part of an answer."""

    ids: list[int]
    segments: list[int]
    positions: list[int]
    learned: list[bool]


def pack(rows: Sequence[Encoded], image_token_id: int | None) -> PackedRow:
    """Merge encodings of questions about one picture; a single one stays as it is.

    Raises:
        ValueError: the prompts do not begin alike up to the end of the picture.
    """
    prompts = [row.input_ids[: row.prompt_length] for row in rows]
    # At least one token of each prompt stays with its question: what comes before an answer predicts its first token.
    shared = min(map(len, prompts)) - 1
    for column, tokens in enumerate(zip(*prompts, strict=False)):
        if len(set(tokens)) > 1:
            shared = min(shared, column)
            break
    if any(token == image_token_id for prompt in prompts for token in prompt[shared:]):
        raise ValueError(
            "training.questions_per_picture: this prompt puts the question before the picture, so that nothing can be "
            "shared; set it to 1, or use another prompt"
        )
    ids, segments = list(prompts[0][:shared]), [PREFIX] * shared
    positions, learned = list(range(shared)), [False] * shared
    for number, row in enumerate(rows, start=1):
        tail = row.input_ids[shared:]
        ids += tail
        segments += [number] * len(tail)
        positions += range(shared, len(row.input_ids))
        learned += [i >= row.prompt_length for i in range(shared, len(row.input_ids))]
    return PackedRow(ids, segments, positions, learned)


def attention_of(segments: torch.Tensor) -> torch.Tensor:
    """Who sees whom: segments (batch, T) to bool (batch, 1, T, T), [query, key]."""
    query, key = segments[:, :, None], segments[:, None, :]
    places = torch.arange(segments.shape[1], device=segments.device)
    earlier = places[:, None] >= places[None, :]
    # Padding sees padding, for a row of nothing but masked keys has no softmax.
    return (earlier & ((key == PREFIX) | (key == query)))[:, None]


@contextmanager
def packed_attention(language_model: PreTrainedModel, segments: torch.Tensor) -> Iterator[None]:
    """Within this context `language_model` attends as `segments` say; its caller passes the usual two-dimensional mask."""
    dtype = input_embeddings(language_model).dtype
    closed = torch.finfo(dtype).min
    mask = torch.zeros((), dtype=dtype, device=segments.device).where(attention_of(segments), closed)

    def swap(
        _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    handle = language_model.register_forward_pre_hook(swap, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def pack_by_picture(examples: Sequence[E], most: int) -> list[tuple[E, ...]]:
    """Put examples with the same pictures together, at most `most` in a pack; packs stand in the order of their first.

    Examples without a picture have nothing to share, and stay alone.
    """
    latest: dict[tuple[str, ...], list[E]] = {}
    packs: list[list[E]] = []
    for example in examples:
        if not example.images or len(latest.get(example.images, ())) in (0, most):
            packs.append([])
            latest[example.images] = packs[-1]
        latest[example.images].append(example)
    return [tuple(members) for members in packs]
