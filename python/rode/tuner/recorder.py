"""Sums of an adapted layer's gates by kind of token, on the device, while statistics are attached."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

CARRIED = 0.9
"""Share of a token's gate mass that `ExampleGates.carriers` counts experts for."""


class TokenKinds:
    """The kind of each token of the running forward pass; shared by all recorders, None between passes."""

    def __init__(self) -> None:
        self.rows: Tensor | None = None  # (kinds, batch, tokens) bool; padding is of no kind


class GateRecorder:
    """Sums of one layer's gates, on the device. A layer calls `record` while statistics are attached.

    Args:
        in_tower: the layer's tokens are patches, and not those of input_ids. side_by_side: each example has several rows of them.
        by_example: keeps sums of each example.
    """

    def __init__(
        self,
        name: str,
        kinds: TokenKinds,
        in_tower: bool,
        by_example: bool = False,
        *,
        side_by_side: bool = False,
    ) -> None:
        self.name, self._kinds, self._in_tower, self._by_example = name, kinds, in_tower, by_example
        self._side_by_side = side_by_side
        self.ranks: dict[str, tuple[int, ...]] = {}
        self.sums: dict[str, Tensor] = {}  # adapter -> (kinds, 1 + 2 N) float64: tokens, open gates, gates
        # adapter -> a (kinds, batch, 1 + 2 N + 4) float64 for each pass: the same, then `mixing`
        self.examples: dict[str, list[Tensor]] = {}

    @torch.no_grad()
    def record(self, adapter: str, ranks: tuple[int, ...], gates: Tensor) -> None:
        """Adds gates (..., N), which may have 1 in place of a dimension of the tokens that they do not depend on.

        Outside of a forward pass, as when checkpointing computes a layer again, nothing counts.
        """
        rows = self._kinds.rows
        if rows is None:
            return
        if self._side_by_side:
            gates = gates.reshape(rows.shape[1], -1, gates.shape[-1])
        if self._in_tower:
            image = gates.new_ones(gates.shape[:-1], dtype=torch.bool)
            rows = torch.stack((image, *[~image] * (len(rows) - 1)))
        gates = self._for_each_token(gates, rows.shape[1:])
        # (tokens, 1 + 2 N); torch.where and a float64 sum, for a product under autocast would round the counts, and a
        # non-finite gate of padding would reach every sum
        values = torch.cat((torch.ones_like(gates[..., :1]), (gates > 0).to(gates.dtype), gates), dim=-1)
        self.ranks[adapter] = ranks
        if self._by_example:
            values = torch.cat((values.double(), mixing(gates)), dim=-1)
            sums = torch.where(rows[..., None], values, 0).flatten(2, -2).sum(2)
            self.examples.setdefault(adapter, []).append(sums)
            return
        sums = torch.where(rows[..., None], values, 0).flatten(1, -2).sum(1, dtype=torch.float64)
        if adapter not in self.sums:
            with torch.inference_mode(False):  # a tensor that later passes of any mode may add to
                self.sums[adapter] = torch.zeros(sums.shape, dtype=sums.dtype, device=sums.device)
        self.sums[adapter] += sums

    def _for_each_token(self, gates: Tensor, tokens: torch.Size) -> Tensor:
        """gates (..., N) expanded to (*tokens, N)."""
        shape = gates.shape[:-1]
        if len(shape) == len(tokens) and all(n in (1, want) for n, want in zip(shape, tokens, strict=True)):
            return gates.expand(*tokens, gates.shape[-1])
        raise ValueError(
            f"GateStatistics: layer {self.name} saw tokens of shape {tuple(shape)}, but input_ids has shape {tuple(tokens)}; "
            "call detach() before running such a model, or adapt other layers"
        )

    def total(self) -> dict[str, Tensor]:
        """adapter -> (kinds, 1 + 2 N), whichever way it was counted."""
        width = {adapter: 1 + 2 * len(ranks) for adapter, ranks in self.ranks.items()}
        summed = {
            adapter: reduce(torch.add, (part.sum(1) for part in parts))[:, : width[adapter]]
            for adapter, parts in self.examples.items()
        }
        return {**self.sums, **summed}


def mixing(gates: Tensor) -> Tensor:
    """How a token's gates (..., N) mix the experts: (..., 4) float64.

    Exact zeros; effective number of experts (exp of the entropy of the gates, normalised to a sum of 1); the fewest experts that
    carry `CARRIED` of the sum; 1 where every gate is zero, and there the two numbers before are 0.
    """
    mass = gates.double().abs()
    total = mass.sum(-1, keepdim=True)
    share = mass / torch.where(total > 0, total, 1)
    effective = torch.exp(-torch.xlogy(share, share).sum(-1, keepdim=True))
    carried = share.sort(-1, descending=True).values.cumsum(-1)
    carriers = 1.0 + (carried < CARRIED - 1e-6).sum(-1, keepdim=True)  # equal gates are equal up to rounding
    zeros = (gates == 0).sum(-1, keepdim=True).double()
    nothing = (total == 0).double()
    return torch.cat((zeros, effective * (1 - nothing), carriers * (1 - nothing), nothing), dim=-1)
