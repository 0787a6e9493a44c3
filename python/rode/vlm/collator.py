"""Batches: right-padded with labels for training, left-padded for generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch.nn import functional as F

from rode.tuner.aux_losses import IGNORE
from rode.vlm.packing import PADDING, pack
from rode.vlm.prompts import Encoded, Picture, PromptEncoder
from rode_food import Example
from rode_food.retry import retried

logger = logging.getLogger(__name__)
Routes = Callable[[Sequence["str | None"], Sequence[str]], "dict[str, torch.Tensor]"]


class PictureSource(Protocol):
    """A function from a picture's path to the picture, or to its stored features: `PixelSource`, `FeatureSource`."""

    def __call__(self, path: str, /) -> Picture: ...


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """Rows of unequal length to an int64 tensor (rows, longest)."""
    width = max(len(row) for row in rows)
    filled = [[value] * (width - len(r)) for r in rows]
    joined = [[*f, *r] if side == "left" else [*r, *f] for f, r in zip(filled, rows, strict=True)]
    return torch.tensor(joined, dtype=torch.int64)


def _pad_by_token(rows: Sequence[torch.Tensor], side: str) -> torch.Tensor:
    """Tensors (T, ...) to one (rows, longest, ...), with zeros where there is padding and where other dimensions are shorter."""
    width = max(len(row) for row in rows)
    if side == "left":
        rows = [torch.cat([row.new_zeros(width - len(row), *row.shape[1:]), row]) for row in rows]
    return _merged([row[None] for row in rows])


def _merged(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one number of dimensions, joined along the first; in the others the smaller ones get zeros at the end."""
    most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
    padded = []
    for part in parts:
        missing = [m - n for m, n in zip(most, part.shape[1:], strict=True)]
        padded.append(F.pad(part, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else part)
    return torch.cat(padded)


def _inputs(rows: Sequence[Encoded], side: str) -> dict[str, torch.Tensor]:
    """Inputs that rows have beside their ids: those by token, and the pictures of all rows one behind the other."""
    inputs = {
        name: _pad_by_token([row.by_token[name] for row in rows], side)
        for name in dict.fromkeys(name for row in rows for name in row.by_token)
    }
    for name in dict.fromkeys(name for row in rows for name in row.vision):
        inputs[name] = _merged([row.vision[name] for row in rows if name in row.vision])
    return inputs


def _pad_id(encoder: PromptEncoder) -> int:
    # Padding is masked everywhere, so any id will do where a tokenizer (Llama's) names none.
    pad = encoder.tokenizer.pad_token_id
    return encoder.end_id if pad is None else int(pad)


class TrainingCollator:
    """Examples, or packs of examples with the same pictures (`pack_by_picture`), to a batch for training.

    `labels` are -100 on pictures, prompt and padding, and the token id on the answer and its end. `truncated` (one
    int64) counts the answers that were cut. A batch with a pack of several questions also has `position_ids` and
    `segments`, see `rode.vlm.packing`. With `name_records` there are `record_ids`, a list of str.

    Args:
        encoder: turns questions and answers into rows.
        source: `PixelSource` or `FeatureSource`.
        routes: (tasks, questions) -> what an adapter's router reads (`rode.training.side_inputs.Routes`), by row; None for nothing.
        name_records: tell whose batch it is.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        source: PictureSource,
        routes: Routes | None = None,
        *,
        name_records: bool = False,
    ) -> None:
        self.encoder, self.source, self.routes = encoder, source, routes
        self.name_records = name_records
        self._warned = False

    def __call__(self, items: Sequence[Example | tuple[Example, ...]]) -> dict[str, Any]:
        packs = [item if isinstance(item, tuple) else (item,) for item in items]
        encoded, rows, cut = [], [], []
        for examples in packs:
            try:
                pictures = [retried(partial(self.source, path)) for path in examples[0].images]
            except OSError as error:  # gone or spoiled since the check before the run
                raise OSError(f"record {examples[0].record_id}: {error}") from error
            members = [self.encoder.encode(e.question, e.answer, pictures, e.record_id) for e in examples]
            if len(members) > 1 and members[0].by_token:
                raise ValueError(
                    f"training.questions_per_picture: expected 1, got a pack of {len(members)}: the processor's "
                    f"{next(iter(members[0].by_token))} cannot be joined"
                )
            cut += [e.record_id for e, row in zip(examples, members, strict=True) if row.truncated]
            encoded.append(members[0])
            rows.append(pack(members, self.encoder.image_token_id))
        if cut and not self._warned:
            self._warned = True
            logger.warning(
                "record %s: the answer was cut to fit max_length=%s; further ones are counted as truncated_answers",
                cut[0],
                self.encoder.max_length,
            )
        labels = [[t if k else IGNORE for t, k in zip(r.ids, r.learned, strict=True)] for r in rows]
        batch: dict[str, Any] = {
            "input_ids": _pad([r.ids for r in rows], _pad_id(self.encoder), "right"),
            "attention_mask": _pad([[1] * len(r.ids) for r in rows], 0, "right"),
            "labels": _pad(labels, IGNORE, "right"),
            **_inputs(encoded, "right"),
            "truncated": torch.tensor(len(cut)),
        }
        if self.routes is not None:
            firsts = [examples[0] for examples in packs]
            batch |= self.routes([e.task for e in firsts], [e.question for e in firsts])
        if any(len(examples) > 1 for examples in packs):
            batch["position_ids"] = _pad([r.positions for r in rows], 0, "right")
            batch["segments"] = _pad([r.segments for r in rows], PADDING, "right")
        if self.name_records:
            batch["record_ids"] = [e.record_id for examples in packs for e in examples]
        return batch


class GenerationCollator:
    """Pictures and questions to a left-padded batch: every answer begins in the same column.

    Args:
        encoder: turns questions into rows, exactly as in training.
        source: as in `TrainingCollator`.
        routes: as in `TrainingCollator`.
    """

    def __init__(self, encoder: PromptEncoder, source: PictureSource, routes: Routes | None = None) -> None:
        self.encoder, self.source, self.routes = encoder, source, routes

    def __call__(
        self,
        images: Sequence[Sequence[str]],
        questions: Sequence[str],
        tasks: Sequence[str | None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The batch.

        Args:
            images: the paths of each question's pictures; none is allowed.
            questions: as many.
            tasks: as many, for an adapter whose router reads them.
        """
        rows = [
            self.encoder.encode_prompt(question, [self.source(path) for path in paths])
            for question, paths in zip(questions, images, strict=True)
        ]
        return self.join(rows, questions, tasks)

    def join(
        self, rows: Sequence[Encoded], questions: Sequence[str], tasks: Sequence[str | None] | None = None
    ) -> dict[str, torch.Tensor]:
        """The batch of rows that `PromptEncoder.encode_prompt` made of these questions."""
        batch = {
            "input_ids": _pad([row.input_ids for row in rows], _pad_id(self.encoder), "left"),
            "attention_mask": _pad([[1] * len(row.input_ids) for row in rows], 0, "left"),
            **_inputs(rows, "left"),
        }
        if self.routes is not None:
            batch |= self.routes([None] * len(rows) if tasks is None else tasks, questions)
        return batch
