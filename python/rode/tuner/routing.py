"""What a forward pass tells the adapted layers beside their input: ids of tasks and clusters, which tokens are prompt or padding;
and what the layers tell back: gates, of which the auxiliary loss is made.

Hooks on the outermost model set it at each forward pass, so that it holds under PEFT, Trainer and `generate` alike. It stays
after the pass: gradient checkpointing computes layers again in backward, and must find what was there.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rode.tuner.balance import GateRecord, auxiliary_loss, sparsity

if TYPE_CHECKING:
    from rode.tuner.config import RodeConfig

SIDE_INPUTS = ("rode_task_ids", "rode_cluster_ids", "rode_prompt_mask")
IGNORE = -100  # labels of what is not learned


class Routing:
    """The state of one model, shared by its adapted layers.

    Attributes:
        side: side inputs of the running pass by name. mask: (batch, T) bool, what is not padding, or None.
        prompt: (batch, T) bool, the prompt's tokens, or None. decoding: a key-value cache holds earlier tokens.
        records: gates of this pass, while they are collected, else None.
        sequence_logits, block_gates: by layer or block, what later calls reuse.
        l1_factor: what `HoldSparsity` multiplies the L1 loss by. closed, gates_seen: counts since it last read them, or None.
    """

    def __init__(self) -> None:
        self.side: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self.prompt: Tensor | None = None
        self.decoding = False
        self.records: list[GateRecord] | None = None
        self.sequence_logits: dict[tuple[str, str], Tensor] = {}
        self.block_gates: dict[tuple[str, str], Any] = {}
        self.prompt_length: int | None = None
        self.l1_factor = 1.0
        self.target_sparsity: float | None = None
        self.closed: Tensor | None = None
        self.gates_seen: Tensor | None = None
        self.handles: list[Any] = []
        self._signature: inspect.Signature | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one pass: a copied or pickled model starts afresh."""
        fresh = Routing().__dict__
        kept = {"given", "l1_factor", "handles", "_signature"}
        return {name: value if name in kept else fresh[name] for name, value in self.__dict__.items()}

    def attach(self, model: nn.Module) -> None:
        """Sets the hooks on `model`, once."""
        if self._signature is not None:
            return
        self._signature = inspect.signature(model.forward)
        self.handles += [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self._signature = [], None

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        self.side = {**self.given, **{name: kwargs.pop(name) for name in SIDE_INPUTS if name in kwargs}}
        self.side = {name: ids for name, ids in self.side.items() if ids is not None}
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        bound = {**bound, **bound.get("kwargs", {})}
        ids = bound.get("input_ids")
        ids = bound.get("inputs_embeds") if ids is None else ids
        mask, labels = bound.get("attention_mask"), bound.get("labels")
        past = bound.get("past_key_values")
        self.decoding = past is not None and past.get_seq_length() > 0
        tokens = None if ids is None else tuple(ids.shape[:2])
        self.mask = None
        if isinstance(mask, Tensor) and mask.dim() == 2 and tokens is not None:
            self.mask = mask[:, -tokens[1] :].bool()  # with a cache the mask covers the past too
        self._set_prompt(labels, tokens, ids)
        training = model.training and torch.is_grad_enabled()
        self.records = [] if training else None
        return args, kwargs

    def _set_prompt(self, labels: Tensor | None, tokens: tuple[int, int] | None, ids: Tensor | None) -> None:
        prompt = self.side.get("rode_prompt_mask")
        if prompt is None and labels is not None:
            prompt = labels == IGNORE
        if prompt is None and tokens is not None and self.prompt_length is not None and not self.decoding:
            prompt = torch.arange(tokens[1], device=ids.device).expand(tokens) < self.prompt_length
        if prompt is not None and self.mask is not None:
            prompt = prompt.bool() & self.mask
        self.prompt = self.mask if prompt is None else prompt.bool()

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        records, self.records = self.records, None
        records = [r for r in records or [] if r.config.aux_loss != "none"]
        if not records or output is None:  # None: the pass failed, and its own error is on the way
            return None
        if not any(r.routed.gates.requires_grad or r.routed.logits.requires_grad for r in records):
            _warn_reentrant()
            return None
        aux = self.loss(records)
        held = [r for r in records if r.config.target_sparsity is not None]
        if held:
            self.target_sparsity = held[0].config.target_sparsity
            closed, total = sparsity(held, self.mask)
            self.closed = closed if self.closed is None else self.closed + closed
            self.gates_seen = total if self.gates_seen is None else self.gates_seen + total
        return add_to_output(output, aux, kwargs)

    def loss(self, records: list[GateRecord]) -> Tensor:
        """The weighted auxiliary loss: for each adapter the mean over its routers."""
        by_config: dict[int, list[GateRecord]] = {}
        for record in records:
            by_config.setdefault(id(record.config), []).append(record)
        total = None
        for group in by_config.values():
            config = group[0].config
            losses = [auxiliary_loss(r, self.mask, self.side.get("rode_task_ids")) for r in group]
            first = losses[0]
            weight = config.aux_weight * (self.l1_factor if config.target_sparsity is not None else 1.0)
            mean = torch.stack([x.to(first.device, first.dtype) for x in losses]).mean() * weight
            total = mean if total is None else total + mean.to(total.device, total.dtype)
        return total

    def record(self, config: RodeConfig, routed: Any, tokens: tuple[int, ...], in_tower: bool) -> None:
        """Keeps gates for the auxiliary loss; not outside of a training pass, as when checkpointing computes a layer again."""
        if self.records is not None and config.aux_loss != "none":
            self.records.append(GateRecord(config, routed, tokens, in_tower))

    def ids(self, config: RodeConfig, x: Tensor) -> Tensor:
        """The ids that this adapter's router reads, int64, with x's leading dimensions or 1 in their place.

        Raises:
            ValueError: they were not given, do not fit the batch, or are none of the adapter's.
        """
        name = config.id_input
        ids = self.side.get(name)
        if ids is None:
            raise ValueError(
                f"{name}: router_input={config.router_input!r} needs the {config.router_input} of each row; pass {name}=(batch,) "
                "int64 to the model or to generate, or enter rode.tuner.routing_inputs(model, ...)"
            )
        ids = ids.to(x.device)
        batch = x.shape[0]
        if ids.dim() == 0 or ids.is_floating_point() or batch % ids.shape[0]:
            raise ValueError(
                f"{name}: expected int64 of shape ({batch},), got {ids.dtype} {tuple(ids.shape)}"
            )
        if batch != ids.shape[0]:  # beams, or several answers to one prompt, stand side by side
            ids = ids.repeat_interleave(batch // ids.shape[0], dim=0)
        if ids.dim() > 1 and ids.shape != x.shape[: ids.dim()]:
            raise ValueError(
                f"{name}: expected shape ({batch},) or {tuple(x.shape[:-1])}, got {tuple(ids.shape)}"
            )
        return ids.reshape(*ids.shape, *(1,) * (x.dim() - 1 - ids.dim()))


def add_to_output(output: Any, aux: Tensor, given: dict[str, Any]) -> Any:
    """A model's output with `aux_loss` in it, and added to its loss where it has one.

    A micro-batch of an accumulated batch counts by its share of learned tokens, as its cross-entropy does, where Trainer tells
    (`num_items_in_batch`).
    """
    if isinstance(output, tuple):
        if given.get("labels") is None:
            raise ValueError(
                "aux_loss: a tuple without a loss has no place for it; call with return_dict=True"
            )
        return (output[0] + _share(aux, given), *output[1:])
    if getattr(output, "loss", None) is not None:
        output["loss"] = output.loss + _share(aux, given).to(output.loss.device)
    output["aux_loss"] = aux
    return output


def _share(aux: Tensor, given: dict[str, Any]) -> Tensor:
    total, labels = given.get("num_items_in_batch"), given.get("labels")
    return aux if total is None or labels is None else aux * learned_share(labels, total)


def learned_share(labels: Tensor, total: Tensor | int) -> Tensor:
    """Of the `total` learned tokens of an accumulated batch, the share that stands in `labels` (batch, T)."""
    return (labels[:, 1:] != IGNORE).sum() / total


def _warn_reentrant() -> None:
    if torch.is_grad_enabled():
        warnings.warn(
            "aux_loss: no gate of this pass has a gradient, so the auxiliary loss is left out: the adapter is frozen, or "
            "checkpointing is reentrant (pass gradient_checkpointing_kwargs={'use_reentrant': False})",
            stacklevel=2,
        )


@contextmanager
def given_inputs(routing: Routing, inputs: dict[str, Tensor | None]) -> Iterator[None]:
    """Within this context passes of the model have these side inputs, unless they are called with their own."""
    unknown = set(inputs) - set(SIDE_INPUTS)
    if unknown:
        raise TypeError(
            f"routing inputs: expected some of {', '.join(SIDE_INPUTS)}, got {', '.join(sorted(unknown))}"
        )
    before = routing.given
    routing.given = {**before, **{name: ids for name, ids in inputs.items() if ids is not None}}
    try:
        yield
    finally:
        routing.given = before


def routing_of(model: nn.Module) -> Routing | None:
    """The state that a model's adapted layers share, or None where there is no such layer."""
    return next(
        (m.routing for m in model.modules() if isinstance(getattr(m, "routing", None), Routing)), None
    )


@contextmanager
def routing_inputs(
    model: nn.Module,
    *,
    task_ids: Tensor | None = None,
    cluster_ids: Tensor | None = None,
    prompt_mask: Tensor | None = None,
) -> Iterator[None]:
    """Side inputs for every forward pass within the context, for callers that cannot pass them as arguments.

    Args:
        model: with RoDE layers, under PEFT or not.
        task_ids, cluster_ids: (batch,) int64, or (batch, T) for ids by token.
        prompt_mask: (batch, T) bool, what router_input "sequence" reads.

    Raises:
        ValueError: the model has no RoDE layer.
    """
    routing = routing_of(model)
    if routing is None:
        raise ValueError("routing_inputs: the model has no RoDE layer; apply a RodeConfig first")
    inputs = {"rode_task_ids": task_ids, "rode_cluster_ids": cluster_ids, "rode_prompt_mask": prompt_mask}
    with given_inputs(routing, inputs):
        yield
