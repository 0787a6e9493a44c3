"""PaliGemma: no chat template; the prompt sees itself whole, the answer sees what came before (token_type_ids 0 and 1)."""

from __future__ import annotations

from typing import Any

from rode.vlm.families import Family


def _template(processor: Any, question: str, pictures: int) -> str:
    """The pictures' tokens and the question; the processor puts BOS behind the former and a newline behind the latter."""
    return str(processor.image_token) * pictures + question


FAMILY = Family(
    template=_template,
    appended="\n",
    answer_inputs={"token_type_ids": 1},
    no_picture="its processor takes no text without a picture",
    packing="its prompt sees itself whole, so that every question changes what stands before it",
)
