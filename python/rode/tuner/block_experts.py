"""Experts that are whole feed-forward blocks (MixLoRA): the block runs once for each of a token's k experts, under hooks.

In pass s every projection of the block adds the LoRA of each token's s-th expert and no other; the block's outputs are then summed
under the gates: `y = sum_s g_s(x) FFN_{e_s(x)}(x)`, where FFN_e has W + scaling B_e A_e in place of each weight W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rode.tuner.routers import Routed, top_experts


class BlockPass:
    """The passes through one block; shared by its adapted layers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.slot = 0
        self._adapter: str | None = None
        self._chosen: Tensor | None = None  # (..., N, k) bool: which expert each pass is for
        self._weights: Tensor | None = None  # (..., k)
        self.whole: Tensor | None = None  # (..., N): the gates of all passes
        # Layer name -> its input, and what the frozen weight made of it.
        self._base: dict[str, tuple[Tensor, Tensor]] = {}

    def attach(self, block: nn.Module) -> list[RemovableHandle]:
        """Sets the hooks on the block; their handles."""
        return [
            block.register_forward_pre_hook(self._before),
            block.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def base(
        self, name: str, base_layer: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The output of the frozen layer of this name; passes of one input share it."""
        kept = self._base.get(name)
        if kept is None or kept[0] is not x:
            kept = self._base[name] = (x, base_layer(x, *args, **kwargs))
        return kept[1]

    def begin(self, adapter: str, routed: Routed, k: int) -> Tensor:
        """Takes the gates of the block's router; the gates of this first pass."""
        if self._adapter not in (None, adapter):
            raise ValueError(
                f"{self.name}: expert_per='block' mixes the outputs of one adapter, but {self._adapter!r} and {adapter!r} are "
                "active; activate one"
            )
        order = top_experts(routed.logits, k)  # (..., k)
        experts = torch.arange(routed.logits.shape[-1], device=order.device)
        chosen, weights = order[..., None, :] == experts[:, None], routed.gates.gather(-1, order)
        self._adapter, self._chosen, self._weights, self.whole = adapter, chosen, weights, routed.gates
        return chosen[..., self.slot].to(weights.dtype)

    def gates(self, adapter: str) -> Tensor | None:
        """Gates (..., N) of this pass: 1 for each token's expert, 0 for the others; None before the block's router ran."""
        if self._chosen is None or self._weights is None or adapter != self._adapter:
            return None
        return self._chosen[..., self.slot].to(self._weights.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one pass."""
        return BlockPass(self.name).__dict__

    def _before(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        self.slot, self._adapter = 0, None
        self._chosen = self._weights = self.whole = None
        self._base.clear()

    def _after(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor | None
    ) -> Tensor | None:
        # Whatever happens, nothing of this pass stays: checkpointing ends a recomputation early, by an exception.
        try:
            if (
                output is None or self._weights is None
            ):  # it failed; or no adapter here has the block for its experts
                return output
            weights = self._weights.to(output.dtype)
            total = weights[..., :1] * output
            for self.slot in range(1, weights.shape[-1]):
                total = total + weights[..., self.slot, None] * block.forward(*args, **kwargs)
            return total
        finally:
            self._before(block, args)
