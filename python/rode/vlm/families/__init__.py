"""How models of one type are fed, where their processor does not say it all: one small file for each such type.

A type that has no file here is fed in the common way (`Family()`): the processor makes the prompt, the image tokens and the
pictures' tensors, and attention is causal with one position for each token.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """The ways of one model type.

    Attributes:
        template: (processor, question, pictures) -> prompt text, for checkpoints that have no chat template.
        appended: text that the processor puts behind every prompt.
        answer_inputs: by name, the value on the answer's tokens of the processor's inputs that have one for each token; else 0.
        prepare: (configuration, processor) -> None: what the processor needs after loading.
        no_picture: why a question needs a picture; None if it needs none.
        packing: why several questions cannot share a picture's tokens; None if they can.
        stored_features: why the tower's features cannot be stored; None if they can.
    """

    template: Callable[[Any, str, int], str] | None = None
    appended: str = ""
    answer_inputs: Mapping[str, int] = field(default_factory=dict)
    prepare: Callable[[Any, Any], None] | None = None
    no_picture: str | None = None
    packing: str | None = None
    stored_features: str | None = None


_FILES = {
    "llava": "llava",
    "paligemma": "paligemma",
    "gemma3": "gemma3",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
    "qwen3_vl_moe": "qwen_vl",
    "mllama": "mllama",
}
"""model_type -> module in this folder."""


def family_of(model: Any) -> Family:
    """The family of a model, or of its configuration, by `model_type`."""
    name = _FILES.get(getattr(getattr(model, "config", model), "model_type", ""))
    if name is None:
        return Family()
    family = importlib.import_module(f"{__name__}.{name}").FAMILY
    assert isinstance(family, Family)
    return family
