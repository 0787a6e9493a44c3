"""`rode generate`: answers to questions about pictures, batched and greedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from rode.training.side_inputs import Routes, make_routes
from rode.vlm import GenerationCollator, PixelSource, PromptEncoder
from rode.vlm.collator import PictureSource
from rode.vlm.families import family_of
from rode.vlm.head import contiguous_head_input
from rode.vlm.load import base_model
from rode_food.progress import Progress

if TYPE_CHECKING:
    from transformers import ProcessorMixin


def _end_tokens(model: Any, encoder: PromptEncoder) -> list[int]:
    """Every id that ends an answer: the one that training teaches, the tokenizer's EOS, and those the checkpoint names."""
    named = model.generation_config.eos_token_id
    named = [] if named is None else named if isinstance(named, list) else [named]
    return sorted({encoder.end_id, *named} | {encoder.tokenizer.eos_token_id} - {None})


def greedy_settings(model: Any, encoder: PromptEncoder, max_new_tokens: int) -> GenerationConfig:
    """What `generate` is called with for greedy answers of at most so many tokens; `eos_token_id` lists every end."""
    ends = _end_tokens(model, encoder)
    pad = encoder.tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0] if pad is None else pad,
        use_cache=True,
    )


@torch.inference_mode()
def answer(
    model: Any,
    processor: ProcessorMixin,
    images: Sequence[str | Sequence[str]],
    questions: Sequence[str],
    *,
    prompt: str = "auto",
    max_new_tokens: int = 256,
    batch_size: int = 8,
    source: PictureSource | None = None,
    tasks: Sequence[str | None] | None = None,
    routes: Routes | None = None,
    progress: bool = False,
    on_batch: Callable[[list[str]], None] | None = None,
) -> list[str]:
    """Answer each question about the picture, or pictures, beside it.

    Decoding is greedy. Questions of one batch are padded on the left, so an answer does not depend on its neighbours
    but for the rounding of batched products.

    Args:
        model: a vision-language model, with or without adapter.
        processor: its processor.
        images: as many as questions: the path of a question's picture, or the paths of its pictures (none is allowed).
        questions: without image token or template.
        prompt: "vicuna", "chat_template" or "auto"; must be what the adapter was trained with.
        max_new_tokens: the longest answer, in tokens.
        batch_size: questions at a time.
        source: where pictures come from; None reads them (`PixelSource`).
        tasks: the task of each question, for an adapter whose router reads it.
        routes: what its router reads (`rode.training.side_inputs.make_routes`); None for an adapter that reads nothing but tasks.
        progress: show a bar.
        on_batch: called with the answers of each batch, as soon as they are there.

    Returns:
        The answers in the order of the questions, without special tokens, stripped.

    Raises:
        OSError: a picture that cannot be read. ValueError: unequal numbers of images and questions.
    """
    if len(images) != len(questions):
        raise ValueError(f"images and questions: expected as many, got {len(images)} and {len(questions)}")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(
            f"batch_size and max_new_tokens: expected at least 1, got {batch_size}, {max_new_tokens}"
        )
    paths = [(image,) if isinstance(image, str) else tuple(image) for image in images]
    encoder = PromptEncoder(processor, prompt, family=family_of(base_model(model)))
    routes = routes or make_routes(getattr(model, "active_peft_config", None), model, processor)
    collate = GenerationCollator(encoder, source or PixelSource(processor), routes)
    tokenizer: Any = encoder.tokenizer
    settings = greedy_settings(model, encoder, max_new_tokens)
    model.eval()
    answers: list[str] = []
    bar = Progress(total=len(images), desc="answers", unit="answer", show=progress)
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        batch = collate(paths[part], questions[part], None if tasks is None else tasks[part])
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        with contiguous_head_input(model):
            ids = model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
        texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        answers += texts
        if on_batch is not None:
            on_batch(texts)
        bar.update(len(ids))
    bar.close()
    return answers
