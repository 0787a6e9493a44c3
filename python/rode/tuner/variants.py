"""How an adapter's mixture is added to the base layer's output: one variant for each kind, picked when the adapter is added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from rode.tuner.rounding import operand
from rode.tuner.routers import Routed
from rode_kernels import gated_mixture, rectified_mixture

if TYPE_CHECKING:
    from rode.tuner.config import RodeConfig
    from rode.tuner.gating import Gated


class Options(TypedDict):
    """Keywords of `gated_mixture` that every variant passes on."""

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    dropout_p: float
    base: Tensor | None
    inplace: bool


class Variant(Protocol):
    """One kind of adapter. It holds no state: parameters and settings are the adapter's."""

    def add(
        self, adapter: Gated, x: Tensor, inputs: Tensor, A: Tensor, B: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        """The mixture, added to `options["base"]`.

        Args:
            x: the layer's input (..., in_features). inputs: the same as the operation takes it, under autocast rounded.
            A, B: packed, in a dtype that goes with inputs.
            options: see `Options`.

        Returns:
            y (..., out_features), and the gates (..., N) that `GateStatistics` counts; None for an adapter without a router, and
            where a rectified router's are read by nobody.
        """


class PlainSum:
    """Experts without a router: every gate is 1."""

    def add(
        self, adapter: Gated, x: Tensor, inputs: Tensor, A: Tensor, B: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        return gated_mixture(inputs, A, B, A.new_ones(len(options["ranks"])), **options), None


class RectifiedRouter:
    """RoDE's own kind: relu gates of the layer's own router, computed inside the operation."""

    def add(
        self, adapter: Gated, x: Tensor, inputs: Tensor, A: Tensor, B: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        router, bias = self.router(adapter, inputs)
        result = rectified_mixture(inputs, A, B, router, bias, return_gates=adapter.reads_gates(), **options)
        return self.kept(adapter, result, x)

    def router(self, adapter: Gated, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """The router's weight and bias as the operation takes them."""
        bias = adapter.held("router_bias")
        return adapter.operand("router_weight", inputs), None if bias is None else operand(bias, inputs)

    def kept(
        self, adapter: Gated, result: Tensor | tuple[Tensor, Tensor], x: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """y and gates of an operation's result; gates are kept for whoever reads them later."""
        if isinstance(result, Tensor):
            return result, None
        y, gates = result
        if adapter.keeps_gates():
            adapter.keep(Routed(gates, gates), gates, x)
        return y, gates


class GivenGates:
    """Gates that are computed before the operation: any other router, or another layer's."""

    def add(
        self, adapter: Gated, x: Tensor, inputs: Tensor, A: Tensor, B: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        gates = adapter.gates(x)
        return gated_mixture(inputs, A, B, gates, **options), gates


class NormedExperts:
    """The experts' activations are normalised; the operation gates them and takes them up, with the identity in place of A."""

    def add(
        self, adapter: Gated, x: Tensor, inputs: Tensor, A: Tensor, B: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        gates = adapter.gates(x)
        down = F.linear(F.dropout(inputs, options["dropout_p"]), A.to(inputs.dtype))
        factor, shift = adapter.norm_weight, adapter.norm_bias
        assert factor is not None, "made with the adapter"
        normed = F.layer_norm(down.to(factor.dtype), factor.shape, factor, shift).to(inputs.dtype)
        identity = torch.eye(len(factor), dtype=A.dtype, device=A.device)
        return gated_mixture(normed, identity, B, gates, **(options | {"dropout_p": 0.0})), gates


class MixedFactors:
    """One expert for each sequence, made of averaged A and averaged B; each sequence's gate is open for its own alone."""

    def add(
        self, adapter: Gated, x: Tensor, inputs: Tensor, A: Tensor, B: Tensor, options: Options
    ) -> tuple[Tensor, Tensor | None]:
        gates = adapter.gates(x)
        rank, count = options["ranks"][0], gates.shape[0]
        if any(size != 1 for size in gates.shape[1:-1]):
            raise ValueError("combine='factors': ids for each token were given; pass one for each sequence")
        own = torch.eye(count, dtype=A.dtype, device=A.device) if count > 1 else A.new_ones(1, 1)
        A, B = mixed_factors(A, B, gates.reshape(count, -1).to(A.dtype), rank)
        options = options | {"ranks": (rank,) * count, "scaling": options["scaling"][:1] * count}
        own = own.reshape(count, *(1,) * (inputs.dim() - 2), count)
        return gated_mixture(inputs, A, B, own, **options), gates


def pick_variant(config: RodeConfig, experts: int, own_router: bool) -> Variant:
    """The variant of an adapter.

    Args:
        experts: of the layer. own_router: the layer has the adapter's router, and it reads the layer's input.
    """
    if not config.needs_router(experts):
        return PlainSum()
    if config.combine == "factors":
        return MixedFactors()
    if config.norm_experts:
        return NormedExperts()
    if config.gate == "relu" and config.router_input == "token" and own_router:
        return RectifiedRouter()
    return GivenGates()


def mixed_factors(A: Tensor, B: Tensor, gates: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Averages of A (N r, K) and of B (O, N r), each under gates (S, N): (S r, K) and (O, S r)."""
    experts = gates.shape[1]
    down = torch.einsum("sn,nrk->srk", gates, A.view(experts, rank, -1)).flatten(0, 1)
    up = torch.einsum("sn,onr->osr", gates, B.view(-1, experts, rank)).flatten(1)
    return down, up
