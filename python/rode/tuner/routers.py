"""Routers: how they start, their logits, and the gates that are computed outside the fused operation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rode_kernels.autocast import autocast_off
from rode_kernels.formula import needs_formula

if TYPE_CHECKING:
    from rode.tuner.config import RodeConfig

TABLE_BOUND = 1e-3  # of a table's uniform start, as Polytropon's


@torch.no_grad()
def init_router_(weight: Tensor, bias: Tensor | None, how: str) -> None:
    """Fills a router (N, K) and its bias (N,) in place; `how` is one of `config.ROUTER_INITS`."""
    if how == "open":
        assert bias is not None, "checked with the configuration"
        weight.zero_()
        bias.fill_(1.0)
        return
    if how == "normal":
        nn.init.normal_(weight, std=0.02)
        if bias is not None:
            bias.zero_()
        return
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))  # both as nn.Linear.reset_parameters
    if bias is not None:
        bound = 1.0 / math.sqrt(weight.shape[1])
        nn.init.uniform_(bias, -bound, bound)


@torch.no_grad()
def init_table_(table: Tensor, embeds: bool, how: str) -> None:
    """Fills a table of ids in place: embeddings (ids, D) as nn.Embedding does, logits (ids, N) as `how` says."""
    if embeds:
        nn.init.normal_(table)
    elif how == "open":
        table.fill_(1.0)
    elif how == "normal":
        nn.init.normal_(table, std=0.02)
    else:
        nn.init.uniform_(table, -TABLE_BOUND, TABLE_BOUND)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    with autocast_off(x.device.type):
        return F.linear(x.to(acc_dtype), weight.to(acc_dtype), None if bias is None else bias.to(acc_dtype))


class _Logits(torch.autograd.Function):
    """F.linear in float32 that keeps x as it came for backward, and no wider copy of it."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows = dh.flatten(0, -2)  # (M, N)
        with autocast_off(x.device.type):
            dx = (dh @ weight.to(dh.dtype)).to(x.dtype) if need_x else None
            dweight = rows.T @ x.flatten(0, -2).to(dh.dtype) if need_weight else None
        return (
            dx,
            None if dweight is None else dweight.to(weight.dtype),
            rows.sum(0).to(ctx.bias_dtype) if need_bias else None,
        )


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x Wr^T + br`, x (..., K) to (..., N), in float32 (float64 for float64 x) under autocast too: rounded logits flip choices."""
    if needs_formula(x, weight, bias):  # a transform or a tangent goes through plain operations alone
        return _linear(x, weight, bias)
    return _Logits.apply(x, weight, bias)


class Routed(NamedTuple):
    """The decision of a router.

    Attributes:
        gates: (..., N), exact zeros where closed.
        logits: (..., N) that they came from.
        chosen: (..., N) bool, which experts were chosen; None where it is those with a gate above 0.
        shares: (..., N), what load balancing averages: the softmax over experts, less the threshold where there is one; None for
            gates without a softmax.
    """

    gates: Tensor
    logits: Tensor
    chosen: Tensor | None = None
    shares: Tensor | None = None

    @property
    def open(self) -> Tensor:
        """(..., N) bool, which experts were chosen."""
        return self.gates > 0 if self.chosen is None else self.chosen


def top_experts(logits: Tensor, k: int) -> Tensor:
    """Indices (..., k) of the largest logits, largest first; ties go to the first expert."""
    return logits.detach().sort(dim=-1, descending=True, stable=True).indices[..., :k]


def _share(gates: Tensor) -> Tensor:
    """Gates divided by their sum over experts; a token with nothing open keeps its zeros."""
    total = gates.sum(-1, keepdim=True)
    return gates / torch.where(total > 0, total, torch.ones_like(total))


def topk_gates(logits: Tensor, config: RodeConfig) -> Routed:
    """Softmax values of the k largest logits, exact zeros for the rest: (..., N) to (..., N).

    Not normalised, the gradient of a kept value reaches every logit through the softmax; normalised, only the kept ones (then the
    gates are the softmax over those). Without scale_by_gate the kept gates are 1 and no gradient passes.
    """
    assert config.top_k is not None, "checked with the configuration"
    open_ = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, top_experts(logits, config.top_k), True)
    scaled = logits / config.temperature
    shares = scaled.softmax(-1)
    if not config.scale_by_gate:
        gates = open_.to(logits.dtype)
    elif config.normalize:
        gates = torch.where(open_, scaled.masked_fill(~open_, -math.inf).softmax(-1), 0.0)
    else:
        gates = torch.where(open_, shares, 0.0)
    return Routed(gates, logits, open_, shares)


def sigmoid_gates(logits: Tensor, config: RodeConfig) -> Tensor:
    """Independent gates in (0, 1), or their shares if normalised."""
    gates = (logits / config.temperature).sigmoid()
    return _share(gates) if config.normalize else gates


def gumbel_sigmoid_gates(logits: Tensor, config: RodeConfig, training: bool) -> Tensor:
    """In training a differentiable sample of the relaxed Bernoulli distribution; else the logits' sigmoid (Polytropon)."""
    if not training:
        gates = logits.sigmoid()
    else:
        # logistic noise: with u uniform, log u - log(1 - u); away from 0 and 1, where it would be infinite
        tiny = torch.finfo(logits.dtype).eps
        u = torch.rand_like(logits).clamp(tiny, 1 - tiny)
        gates = ((logits + u.log() - (-u).log1p()) / config.temperature).sigmoid()
    return _share(gates) if config.normalize else gates


def threshold_gates(logits: Tensor, threshold: Tensor, config: RodeConfig) -> Routed:
    """`(softmax - threshold)+`, or its shares if normalised (AdaMoLE); threshold (..., 1)."""
    above = (logits / config.temperature).softmax(-1) - threshold
    kept = above.relu()
    return Routed(_share(kept) if config.normalize else kept, logits, above >= 0, above)


def expert_choice(logits: Tensor, mask: Tensor | None, capacity: float, temperature: float = 1.0) -> Routed:
    """Each expert takes the C tokens of a sequence that want it most (Zhou et al. 2022): C = ceil(capacity * tokens / N).

    A token's gate is its softmax value over experts; whoever is not taken gets 0. A token's gate depends on later tokens.

    Args:
        logits: (batch, T, N). mask: (batch, T) bool, tokens that count; None for all.
        capacity: mean number of experts for each token.
    """
    values = (logits / temperature).softmax(-1)
    if mask is None:
        mask = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    experts = logits.shape[-1]
    # in float64 and the product first: a rounded factor would make 7 of 21 * 2 / 7
    places = torch.ceil(mask.sum(1, keepdim=True).double() * capacity / experts)
    wish = values.detach().masked_fill(~mask[..., None], -1.0)
    order = wish.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(logits.shape[1], device=logits.device)[None, :, None].expand_as(order)
    )
    open_ = (rank < places[..., None]) & mask[..., None]
    return Routed(torch.where(open_, values, 0.0), logits, open_, values)


def compute_gates(
    config: RodeConfig,
    logits: Tensor,
    *,
    training: bool,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
) -> Routed:
    """Gates of the routed experts from logits (..., N), in the logits' dtype.

    Args:
        threshold: (..., 1), for gate "threshold". mask: (batch, T), for "expert-choice".
    """
    gate = config.gate
    if gate == "expert-choice":
        assert config.capacity is not None, "set with the configuration"
        return expert_choice(logits, mask, config.capacity, config.temperature)
    if gate == "topk":
        return topk_gates(logits, config)
    if gate == "threshold":
        assert threshold is not None, "made by the layer for this gate"
        return threshold_gates(logits, threshold, config)
    if gate == "softmax":
        gates = (logits / config.temperature).softmax(-1)
        return Routed(gates, logits, None, gates)
    if gate == "relu":
        gates = logits.relu()
    elif gate == "sigmoid":
        gates = sigmoid_gates(logits, config)
    else:
        gates = gumbel_sigmoid_gates(logits, config, training)
    return Routed(gates, logits)


def with_universal(gates: Tensor) -> Tensor:
    """Gates (..., N - 1) and that of the universal expert behind them, 1 - their largest (MoCLE): (..., N)."""
    return torch.cat((gates, 1 - gates.amax(-1, keepdim=True)), dim=-1)
