"""Batches: right-padded with labels for training, left-padded for generation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from rode.tuner.aux_losses import IGNORE
from rode.vlm.packing import PADDING, pack
from rode.vlm.prompts import PromptEncoder
from rode_food import Example

logger = logging.getLogger(__name__)
Routes = Callable[[Sequence["str | None"], Sequence[str]], "dict[str, torch.Tensor]"]


class PictureSource(Protocol):
    """A function from a picture's path to its tensor: `PixelSource`, `FeatureSource`."""

    def __call__(self, path: str, /) -> torch.Tensor: ...

    def image_tokens(self, picture: torch.Tensor, /) -> int:
        """How many tokens the picture takes in the language model."""
        ...


def _pad(rows: Sequence[Sequence[int]], value: int, side: str) -> torch.Tensor:
    """Rows of unequal length to an int64 tensor (rows, longest)."""
    width = max(len(row) for row in rows)
    filled = [[value] * (width - len(r)) for r in rows]
    joined = [[*f, *r] if side == "left" else [*r, *f] for f, r in zip(filled, rows, strict=True)]
    return torch.tensor(joined, dtype=torch.int64)


def _pad_id(encoder: PromptEncoder) -> int:
    tokenizer = encoder.processor.tokenizer
    # Padding is masked everywhere, so any id will do where a tokenizer (Llama's) names none.
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


class TrainingCollator:
    """Examples, or packs of examples with one picture (`pack_by_picture`), to a batch for training.

    `labels` are -100 on picture, prompt and padding, and the token id on the answer and its EOS. `truncated` (one
    int64) counts the answers that were cut. A batch with a pack of several questions also has `position_ids` and
    `segments`, see `rode.vlm.packing`. With `name_records` there are `record_ids`, a list of str.

    Args:
        encoder: turns questions and answers into ids.
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
        pictures, rows, cut = [], [], []
        for examples in packs:
            try:
                pictures.append(self.source(examples[0].image))
            except OSError as error:  # gone or spoiled since the check before the run
                raise OSError(f"record {examples[0].record_id}: {error}") from error
            tokens = self.source.image_tokens(pictures[-1])
            encoded = [self.encoder.encode(e.question, e.answer, tokens, e.record_id) for e in examples]
            cut += [e.record_id for e, row in zip(examples, encoded, strict=True) if row.truncated]
            rows.append(pack(encoded, self.encoder.image_token_id))
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
            "pixel_values": torch.stack(pictures),
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
        encoder: turns questions into ids, exactly as in training.
        source: as in `TrainingCollator`.
        routes: as in `TrainingCollator`.
    """

    def __init__(self, encoder: PromptEncoder, source: PictureSource, routes: Routes | None = None) -> None:
        self.encoder, self.source, self.routes = encoder, source, routes

    def __call__(
        self, images: Sequence[str], questions: Sequence[str], tasks: Sequence[str | None] | None = None
    ) -> dict[str, torch.Tensor]:
        pictures = [self.source(image) for image in images]
        rows = [
            self.encoder.encode_prompt(question, self.source.image_tokens(picture))
            for question, picture in zip(questions, pictures, strict=True)
        ]
        batch = {
            "input_ids": _pad(rows, _pad_id(self.encoder), "left"),
            "attention_mask": _pad([[1] * len(row) for row in rows], 0, "left"),
            "pixel_values": torch.stack(pictures),
        }
        if self.routes is not None:
            batch |= self.routes([None] * len(rows) if tasks is None else tasks, questions)
        return batch
