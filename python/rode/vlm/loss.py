"""Next-token cross-entropy on the answer alone, without logits for any other position."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from rode.tuner.aux_losses import learned_share
from rode.vlm.collator import IGNORE


def answer_loss(
    model: torch.nn.Module,
    head: torch.nn.Module,
    inputs: dict[str, Any],
    labels: torch.Tensor,
    num_items: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """The loss that `model(**inputs, labels=labels)` has, auxiliary losses included, computed on fewer positions.

    Only hidden states whose next token is learned reach `head`: with 576 picture tokens before a short answer that
    is a small part, and vocabulary-wide logits are the largest tensors of a step.

    Args:
        model: what is called; may be wrapped (PEFT, DDP).
        head: the language-model head inside `model`.
        inputs: input_ids, attention_mask (batch, T), pixel_values, ...
        labels: (batch, T), -100 where nothing is learned.
        num_items: tokens learned in the whole accumulated batch; None for those of `labels`.

    Returns:
        float32 scalar: sum of the cross-entropies / num_items, and of an auxiliary loss this batch's share of learned tokens.
    """
    targets = labels[:, 1:]  # position t predicts token t + 1
    learned = targets != IGNORE
    rows, columns = learned.nonzero(as_tuple=True)

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0][rows, columns],)  # (learned, hidden)

    # A hook on the head, not a call into the model's parts: PEFT's and DDP's own wrapping of forward stays in force.
    handle = head.register_forward_pre_hook(select)
    try:
        output = model(**inputs)
    finally:
        handle.remove()
    logits = output.logits  # (learned, vocabulary)
    total = F.cross_entropy(logits.float(), targets[learned], reduction="sum")
    count = num_items if num_items is not None else learned.sum().clamp(min=1)
    loss = total / count
    if (aux := output.get("aux_loss")) is not None:  # of an adapter's gates, see rode.tuner.aux_losses
        loss = loss + (aux * learned_share(labels, count)).to(loss.device, loss.dtype)
    return loss
