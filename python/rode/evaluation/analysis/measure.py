"""Gates on held-out examples: one forward pass over prompt and answer, task by task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rode.training.side_inputs import Routes
from rode.tuner import GateStatistics
from rode.tuner.statistics import IGNORE, ExampleGates
from rode.vlm import PixelSource, PromptEncoder, TrainingCollator
from rode.vlm.collator import PictureSource
from rode.vlm.families import family_of
from rode.vlm.load import base_model
from rode_food import ALL_TASKS, Example
from rode_food.progress import Progress

if TYPE_CHECKING:
    from transformers import ProcessorMixin

ANSWERS = ("truth", "generated")


@dataclass(frozen=True)
class TaskGates:
    """One task's examples.

    Attributes:
        ids: record of each example, in the order of the layers' rows.
        layers: sums of each adapted layer's gates, example by example.
        loss: mean cross-entropy of the answers' tokens.
    """

    ids: tuple[str, ...]
    layers: tuple[ExampleGates, ...]
    loss: float


@torch.inference_mode()
def measure(
    model: Any,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    *,
    prompt: str = "auto",
    batch_size: int = 8,
    answers: str = "truth",
    max_new_tokens: int = 256,
    source: PictureSource | None = None,
    routes: Routes | None = None,
    progress: bool = False,
) -> dict[str, TaskGates]:
    """Run the model over each example's picture, question and answer, and keep its gates.

    Nothing is sampled, so that the same call gives the same numbers.

    Args:
        model: a vision-language model with an adapter that has a router.
        processor, prompt, batch_size, source, routes, progress: see `rode.evaluation.generate.answer`.
        examples: at least one; the tasks among them are measured apart.
        answers: "truth" runs over the true answers, "generated" over the model's own, which cost a generation each.
        max_new_tokens: the longest generated answer.

    Returns:
        task -> gates, tasks in the order of `rode_food.ALL_TASKS`.

    Raises:
        ValueError: no example, no router, or an unknown choice of answers.
    """
    if not examples:
        raise ValueError("examples: expected at least one to analyse, got none")
    if answers not in ANSWERS:
        raise ValueError(f"answers: expected one of {', '.join(ANSWERS)}, got {answers!r}")
    gate = getattr(getattr(model, "active_peft_config", None), "gate", None)
    if gate in (None, "none"):
        what = "no RoDE adapter" if gate is None else "an adapter with gate='none'"
        raise ValueError(f"the model has {what}: without a router there is nothing to analyse")
    source = source or PixelSource(processor)
    if answers == "generated":
        examples = _with_own_answers(
            model, processor, examples, prompt, batch_size, max_new_tokens, source, routes, progress
        )
    encoder = PromptEncoder(processor, prompt, family=family_of(base_model(model)))
    collate = TrainingCollator(encoder, source, routes)
    model.eval()
    found: dict[str, TaskGates] = {}
    with (
        GateStatistics(answers=True, by_example=True).attach(model) as statistics,
        Progress(total=len(examples), desc="gates", unit="example", show=progress) as bar,
    ):
        for task in ALL_TASKS:
            # Like lengths together: less padding.
            chosen = sorted(
                (e for e in examples if e.task == task), key=lambda e: len(e.question) + len(e.answer)
            )
            if not chosen:
                continue
            statistics.reset()
            total, count = 0.0, 0
            for start in range(0, len(chosen), batch_size):
                batch = collate(chosen[start : start + batch_size])
                del batch["truncated"]
                learned = int((batch["labels"][:, 1:] != IGNORE).sum())
                batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
                total = total + model(**batch, use_cache=False).loss.double() * learned
                count += learned
                bar.update(min(batch_size, len(chosen) - start))
            ids = tuple(example.record_id for example in chosen)
            found[task] = TaskGates(ids, statistics.examples(), float(total) / count)
    return found


def _with_own_answers(
    model: Any,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    prompt: str,
    batch_size: int,
    max_new_tokens: int,
    source: PictureSource,
    routes: Routes | None,
    progress: bool,
) -> list[Example]:
    from rode.evaluation.generate import answer

    examples = sorted(examples, key=lambda e: (e.task, len(e.question)))
    own = answer(
        model,
        processor,
        [e.images for e in examples],
        [e.question for e in examples],
        prompt=prompt,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        source=source,
        tasks=[e.task for e in examples],
        routes=routes,
        progress=progress,
    )
    return [dataclasses.replace(e, answer=text) for e, text in zip(examples, own, strict=True)]
