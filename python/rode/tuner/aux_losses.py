"""Auxiliary losses on gates: load balance, importance, L1. Each is a mean over routers, with padding left out."""

from __future__ import annotations

import warnings
from functools import reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from rode.tuner.routers import Routed

if TYPE_CHECKING:
    from rode.tuner.config import RodeConfig

IGNORE = -100  # labels of what is not learned


class GateRecord(NamedTuple):
    """The gates of one router in one forward pass.

    Attributes:
        adapter, config: whose they are.
        routed: of its routed experts, (..., N) with leading dimensions that broadcast over `tokens`.
        tokens: leading shape of the layer's input. in_tower: its tokens are not those of input_ids.
    """

    adapter: str
    config: RodeConfig
    routed: Routed
    tokens: tuple[int, ...]
    in_tower: bool


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over tokens of values (M, N) under weights (M,); a weight of 0 keeps even what is not finite out."""
    kept = torch.where(weights[:, None] > 0, values, 0.0)
    return (kept * weights[:, None]).sum(0) / weights.sum().clamp(min=1.0)


def load_balance(shares: Tensor, open_: Tensor, weights: Tensor) -> Tensor:
    """`N sum_i f_i P_i` (Switch Transformer, Eq. 4; Mixtral): 1 (k with k experts a token) when all experts are used alike.

    Args:
        shares: (M, N); P_i is their mean. open_: (M, N) bool; f_i is the share of tokens that chose i.
        weights: (M,), 0 for padding.
    """
    chosen = _mean(open_.to(shares.dtype), weights)
    return shares.shape[-1] * (chosen * _mean(shares, weights)).sum()


def importance(total: Tensor) -> Tensor:
    """Squared coefficient of variation, var / mean^2, of summed gates (N,) (Shazeer et al. 2017) or (batch, N) (LoRAMoE)."""
    if total.numel() == 1:
        return total.sum() * 0.0
    return total.var() / (total.mean() ** 2 + 1e-10)


def group_weights(groups: Tensor, experts: int, delta: float) -> Tensor:
    """(batch,) groups to (batch, N): 1 + delta for experts of the sequence's own half, 1 - delta for the other half."""
    half = (torch.arange(experts, device=groups.device) >= (experts + 1) // 2).to(groups.dtype)
    return torch.where(groups[:, None] == half, 1.0 + delta, 1.0 - delta)


def l1(gates: Tensor, open_: Tensor, weights: Tensor, target_sparsity: float | None) -> Tensor:
    """Mean over tokens of the summed gates (M, N), each expert's weighted by how often it is open (ReMoE).

    That weight, `f_i = (share of tokens that open i) / (1 - target_sparsity)`, pushes busy experts more; without a target it is 1.
    """
    mean = _mean(gates, weights)
    if target_sparsity is not None:
        mean = mean * (_mean(open_.to(gates.dtype), weights) / (1 - target_sparsity))
    return mean.sum()


def sparsity(records: list[GateRecord], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(closed gates, all gates) over the records' tokens that are not padding; counts on the device."""
    closed, total = [], []
    for record in records:
        open_ = _rows(record.routed.open, record.tokens)
        weights = token_weights(record, mask, open_).double()
        closed.append(((~open_).double() * weights[:, None]).sum())
        total.append(weights.sum() * open_.shape[-1])
    return torch.stack(closed).sum(), torch.stack(total).sum()


def _rows(values: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """(..., N), broadcast over the tokens, as (M, N)."""
    return values.expand(*tokens, values.shape[-1]).flatten(0, -2)


def token_weights(record: GateRecord, mask: Tensor | None, like: Tensor) -> Tensor:
    """(M,) float: 1 for tokens that count, 0 for padding."""
    count = like.shape[0]
    dtype = like.dtype if like.is_floating_point() else torch.float32
    if mask is None or record.in_tower:
        return torch.ones(count, dtype=dtype, device=like.device)
    if mask.numel() != count:
        raise ValueError(
            f"aux_loss: an adapted layer saw {count} tokens, but attention_mask has {mask.numel()}; call the model with a mask of "
            "its input, or adapt other layers"
        )
    return mask.reshape(-1).to(like.device, dtype)


def check_ids(name: str, ids: Tensor, count: int, field: str) -> None:
    """Raises ValueError for ids outside of [0, count); on a CPU, where looking costs nothing."""
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= count:
            raise ValueError(f"{name}: expected ids below {field}={count}, got {low if low < 0 else high}")


def auxiliary_loss(record: GateRecord, mask: Tensor | None, task_ids: Tensor | None) -> Tensor:
    """The loss of one router, without its weight: a scalar in the gates' dtype.

    Args:
        mask: (batch, T) bool, tokens that are not padding; None for all.
        task_ids: (batch,) or (batch, T), for aux_groups.
    """
    config, routed, tokens = record.config, record.routed, record.tokens
    gates, open_ = _rows(routed.gates, tokens), _rows(routed.open, tokens)
    weights = token_weights(record, mask, gates)
    if config.aux_loss == "l1":
        return l1(gates, open_, weights, config.target_sparsity)
    if config.aux_loss == "load-balance":
        assert routed.shares is not None, "checked with the configuration: the gate is a softmax"
        shares = _rows(routed.shares, tokens)
        if config.gate == "softmax":  # all are open; the largest counts as the choice
            open_ = torch.zeros_like(open_).scatter(-1, shares.argmax(-1, keepdim=True), True)
        return load_balance(shares, open_, weights)
    kept = torch.where(weights[:, None] > 0, gates, 0.0)
    if config.aux_groups is None:
        return importance(kept.sum(0))
    if task_ids is None or task_ids.shape != tokens[:1]:
        got = None if task_ids is None else tuple(task_ids.shape)
        raise ValueError(
            f"aux_groups: which group a sequence belongs to follows from its task; pass rode_task_ids ({tokens[0]},) to the model, "
            f"got {got}"
        )
    assert config.aux_delta is not None, "set with the configuration"
    check_ids("rode_task_ids", task_ids, len(config.aux_groups), "aux_groups")
    groups = torch.tensor(config.aux_groups, device=gates.device)[task_ids.to(gates.device)]
    by_sequence = kept.unflatten(0, (tokens[0], -1)).sum(1)  # (batch, N)
    return importance(by_sequence * group_weights(groups, gates.shape[-1], config.aux_delta).to(gates.dtype))


def mean_over_routers(
    records: list[GateRecord], mask: Tensor | None, task_ids: Tensor | None, l1_factor: float
) -> Tensor:
    """The weighted auxiliary loss of a pass: for each adapter the mean over its routers, summed over adapters.

    Args:
        mask, task_ids: as of `auxiliary_loss`. l1_factor: of adapters with target_sparsity.
    """
    by_adapter: dict[str, list[GateRecord]] = {}
    for record in records:
        by_adapter.setdefault(record.adapter, []).append(record)
    means: list[Tensor] = []
    for group in by_adapter.values():
        config = group[0].config
        assert config.aux_weight is not None, "set with the configuration"
        losses = [auxiliary_loss(record, mask, task_ids) for record in group]
        first = losses[0]
        weight = config.aux_weight * (l1_factor if config.target_sparsity is not None else 1.0)
        means.append(torch.stack([x.to(first.device, first.dtype) for x in losses]).mean() * weight)
    return reduce(lambda total, mean: total + mean.to(total.device, total.dtype), means)


def add_to_output(
    output: tuple[Any, ...] | dict[str, Any], aux: Tensor, given: dict[str, Any]
) -> tuple[Any, ...] | dict[str, Any]:
    """A model's output (a tuple, a ModelOutput or a plain dict) with `aux_loss` in it, and added to its loss where it has one.

    A micro-batch of an accumulated batch counts by its share of learned tokens, as its cross-entropy does, where Trainer tells
    (`num_items_in_batch`).
    """
    if isinstance(output, tuple):
        if given.get("labels") is None:
            raise ValueError(
                "aux_loss: a tuple without a loss has no place for it; call with return_dict=True"
            )
        return (output[0] + _share(aux, given), *output[1:])
    if output.get("aux_loss") is not None:
        raise ValueError(
            "aux_loss: the model has an auxiliary loss of its own (output_router_logits); turn it off, or the adapter's"
        )
    loss = output.get("loss")
    if loss is not None:
        output["loss"] = loss + _share(aux, given).to(loss.device)
    output["aux_loss"] = aux
    return output


def _share(aux: Tensor, given: dict[str, Any]) -> Tensor:
    total, labels = given.get("num_items_in_batch"), given.get("labels")
    return aux if total is None or labels is None else aux * learned_share(labels, total)


def learned_share(labels: Tensor, total: Tensor | int) -> Tensor:
    """The fraction of an accumulated batch's `total` learned tokens that stands in `labels` (batch, T)."""
    return (labels[:, 1:] != IGNORE).sum() / total


def warn_without_gradient() -> None:
    """Warns that no gate of a pass has a gradient, where gradients are enabled."""
    if torch.is_grad_enabled():
        warnings.warn(
            "aux_loss: no gate of this pass has a gradient, so the auxiliary loss is left out: the adapter is frozen, or "
            "checkpointing is reentrant (pass gradient_checkpointing_kwargs={'use_reentrant': False})",
            stacklevel=2,
        )


def warn_if_left_out(loss: Tensor, records: list[GateRecord]) -> None:
    """Has the backward pass warn if it reaches gates without having come through their auxiliary loss.

    A trainer that computes its own loss from the model's logits does not look at `output.loss`.
    """
    if torch.compiler.is_compiling() or not loss.requires_grad:
        return
    told = False  # once for a pass, by its loss or by the first gates

    def silence(_: Tensor) -> None:
        nonlocal told
        told = True

    def at_gates(_: tuple[Tensor, ...]) -> None:
        nonlocal told
        if not told:
            told = True
            warnings.warn(
                "aux_loss: this backward pass reaches the gates and not their auxiliary loss, which therefore trains nothing: the "
                "loss was computed from the model's logits (as TRL, compute_loss_func and label smoothing do); add "
                "output.aux_loss to it, or set aux_loss='none'",
                stacklevel=2,
            )

    # If the loss takes part, its hook runs first: a node waits for all that depends on it, as gates and loss do on logits.
    loss.register_hook(silence)
    for record in records:
        node = _where_made(record.routed.logits)
        if node is not None:
            node.register_prehook(at_gates)


def _where_made(tensor: Tensor) -> Node | None:
    """The node of the graph that computed the tensor, behind views and casts of it: it may have other results as well."""
    node = tensor.grad_fn
    while node is not None:
        before = [other for other, _ in node.next_functions if other is not None]
        if (
            len(before) != 1 or not before[0].next_functions
        ):  # several inputs, or a parameter, whose node outlives the pass
            break
        node = before[0]
    return node
