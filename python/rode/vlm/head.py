"""The language model's head where only a batch's last tokens reach it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rode.vlm.load import base_model


def _contiguous(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    if not args or not isinstance(args[0], torch.Tensor) or args[0].device.type != "cpu":
        return None
    x = args[0]
    # not as it is: a dimension of 1 may have any stride, at which at::matmul looks
    return (x.reshape(-1, x.shape[-1]).contiguous().view(x.shape), *args[1:])


@contextmanager
def contiguous_head_input(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the head takes its input in one piece, on a CPU.

    `generate` hands the head the last token of each prompt as a view. Where the weight is frozen, PyTorch multiplies a view
    prompt by prompt (`at::matmul` folds rows only where they lie together), and copies the whole weight for each: 5 GB for 96
    prompts of SmolLM2-135M.
    """
    head = base_model(model).get_output_embeddings()
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(_contiguous)
    try:
        yield
    finally:
        handle.remove()
