"""One forward pass of a model, as its adapted layers see it.

`ForwardContext` hangs on the outermost model by one pair of hooks, so that it works under PEFT, Trainer and `generate` alike. It
reads the call once, tells layers what their input does not say (ids of tasks and clusters, which tokens are prompt or padding), and
makes the auxiliary loss of what they record. Its state stays after the pass: gradient checkpointing computes layers again in
backward and must find it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from types import MethodType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rode.tuner.aux_losses import (
    IGNORE,
    GateRecord,
    add_to_output,
    mean_over_routers,
    sparsity,
    warn_if_left_out,
    warn_without_gradient,
)
from rode.tuner.forward_pass import ForwardPass, Passes, fit_rows
from rode.tuner.routers import Routed

if TYPE_CHECKING:
    from transformers import Cache

    from rode.tuner.config import RodeConfig

Item = TypeVar("Item")

SIDE_INPUTS = ("rode_task_ids", "rode_cluster_ids", "rode_prompt_mask")


@dataclass(frozen=True)
class ForwardCall:
    """The arguments of one call of a model.

    Attributes:
        given: the arguments by name, those in **kwargs included, without side inputs.
        training: the model trains and gradients are enabled.
    """

    given: dict[str, Any]
    training: bool

    @property
    def cache(self) -> Cache | None:
        """The key-value cache, or None; transformers calls it `cache` from 5.24 on."""
        past = self.given.get("past_key_values")
        new = self.given.get("cache")
        return new if past is None and hasattr(new, "get_seq_length") else past

    @property
    def tokens(self) -> tuple[int, int] | None:
        """(batch, T) of the input, or None where neither ids nor embeddings were given."""
        ids = self.given.get("input_ids")
        ids = self.given.get("inputs_embeds") if ids is None else ids
        return None if ids is None else (ids.shape[0], ids.shape[1])


class Listener(Protocol):
    """Who wants to know of every forward pass of a model."""

    def begin(self, call: ForwardCall) -> None:
        """The pass begins."""

    def end(self) -> None:
        """The pass is over, or has failed."""


class ForwardContext:
    """The state of one model's forward pass, shared by its adapted layers.

    Attributes:
        passes: what the running pass was called with, and earlier ones; see `Passes`.
        records: by the loss that is made of them, what layers recorded in this pass; None while nothing is collected.
        differentiable: gradients were enabled when the pass began.
        sequence_logits, block_gates: of this pass, by layer or block; the former stay with the key-value cache that it filled.
        l1_factor: what `HoldSparsity` multiplies the L1 loss by. closed, gates_seen: counts since it last read them, or None.
        listeners: told of every pass.
    """

    def __init__(self) -> None:
        self.passes = Passes()
        self.given: dict[str, Tensor] = {}
        self.records: dict[Callable[[ForwardContext, list[Any]], Tensor | None], list[Any]] | None = None
        self.differentiable = False
        self.sequence_logits: dict[tuple[str, str], Tensor] = {}
        self.block_gates: dict[tuple[str, str], Tensor] = {}
        self.generating: Tensor | None = None  # (batch, T) bool: the prompt that `generate` was called with
        self._past: Cache | None = None
        self._kept: WeakKeyDictionary[Cache, dict[tuple[str, str], Tensor]] = WeakKeyDictionary()
        self.l1_factor = 1.0
        self.target_sparsity: float | None = None
        self.closed: Tensor | None = None
        self.gates_seen: Tensor | None = None
        self.listeners: list[Listener] = []
        self.handles: list[RemovableHandle] = []
        self.attached = self.needed = False  # whether the hooks on the model are set, and layers need them
        self._signature: inspect.Signature | None = None  # of the model's forward, read at the first pass

    def __getstate__(self) -> dict[str, Any]:
        """The state without what belongs to one pass or one process: a copied or pickled model starts afresh."""
        kept = ("given", "l1_factor", "listeners", "handles", "attached", "needed")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(ForwardContext().__dict__ | state)

    @classmethod
    def on(cls, model: nn.Module) -> ForwardContext:
        """The context whose hooks are on `model`; else that of its adapted layers, or a new one, with its hooks set."""
        for hook in model._forward_pre_hooks.values():
            if isinstance(hook, MethodType) and isinstance(hook.__self__, cls):
                return hook.__self__
        own = context_of(model)
        # Layers of a model within this one may be called apart from it: they keep a context of their own.
        context = own if own is not None and not own.attached else cls()
        context.attach(model)
        return context

    @classmethod
    def listen(cls, model: nn.Module, listener: Listener) -> ForwardContext:
        """Has `listener` told of every pass of `model`."""
        context = cls.on(model)
        context.listeners.append(listener)
        return context

    def stop_listening(self, listener: Listener) -> None:
        """Ends that; hooks that nobody else needs go."""
        self.listeners.remove(listener)
        if not self.listeners and not self.needed:
            self.detach()

    def attach(self, model: nn.Module, needed: bool = False) -> None:
        """Sets the hooks on `model`, once.

        Args:
            needed: by layers, so that they stay when the last listener goes.
        """
        self.needed = self.needed or needed
        if self.attached:
            return
        self.attached = True
        # Methods, not closures: a copy of the model then has hooks that refer to the copy's context.
        self.handles += [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        """Takes the hooks off, and leaves the model's calls and output as they were."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.attached, self.needed, self._signature = [], False, False, None
        self.passes, self.records = Passes(), None

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs, this = dict(kwargs), self.passes.begin()
        side = {**self.given, **{name: kwargs.pop(name) for name in SIDE_INPUTS if name in kwargs}}
        this.side = {name: ids for name, ids in side.items() if ids is not None}
        if self._signature is None:
            self._signature = inspect.signature(model.forward)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        self.differentiable = torch.is_grad_enabled()
        call = ForwardCall({**bound, **bound.get("kwargs", {})}, model.training and self.differentiable)
        self._past = call.cache
        held = 0 if self._past is None else int(self._past.get_seq_length())
        this.decoding = held > 0
        self.block_gates, self.sequence_logits = {}, {}
        _set_mask(this, call.given.get("attention_mask"), call.tokens)
        self._set_prompt(this, call.given.get("labels"), call.tokens, held, call.training)
        self.records = {} if model.training else None
        for listener in self.listeners:
            listener.begin(call)
        self.passes.running = True
        return args, kwargs

    def _set_prompt(
        self,
        this: ForwardPass,
        labels: Tensor | None,
        tokens: tuple[int, int] | None,
        held: int,
        training: bool,
    ) -> None:
        given = this.side.get("rode_prompt_mask")
        if given is None and self.generating is not None:
            given = self.generating
            length = given.shape[1]
            # in pieces, of which a router would see one at a time
            this.told_prompt = held >= length or (held == 0 and tokens is not None and tokens[1] >= length)
        elif given is None:
            this.told_prompt = labels is not None or not training
        if given is not None and this.told_prompt and tokens is not None and not held:
            this.prompt = fit_rows(given.bool(), tokens)
        elif given is None and labels is not None:
            this.prompt = labels == IGNORE
        if this.prompt is None:
            this.prompt = this.mask
        elif this.mask is not None:
            this.prompt = this.prompt & this.mask

    def kept_logits(self) -> dict[tuple[str, str], Tensor]:
        """Logits that the prompt of the running pass's key-value cache led to."""
        return {} if self._past is None else self._kept.get(self._past, {})

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        for listener in self.listeners:
            listener.end()
        if self.sequence_logits:
            new = hasattr(output, "cache")  # from transformers 5.24 on, which warns of the older name
            cache = output.cache if new else getattr(output, "past_key_values", None)
            if cache is not None:
                self._kept[cache] = self.sequence_logits
        self._past, self.sequence_logits = None, {}
        records, self.records = self.records, None
        try:
            if records and output is not None:  # None: the pass failed, and its own error is on the way
                losses = [loss for make, items in records.items() if (loss := make(self, items)) is not None]
                if losses:
                    first = losses[0]
                    total = reduce(torch.add, (x.to(first.device, first.dtype) for x in losses))
                    output = add_to_output(output, total, kwargs)
        finally:
            self.passes.end(output)
        return output

    def record(self, loss: Callable[[ForwardContext, list[Item]], Tensor | None], item: Item) -> None:
        """Keeps what an auxiliary loss is made of; not outside of a pass, as when checkpointing computes a layer again.

        Args:
            loss: what makes the loss of all items that were recorded for it, in the layers' order.
        """
        if self.records is not None:
            self.records.setdefault(loss, []).append(item)

    def record_gates(
        self, adapter: str, config: RodeConfig, routed: Routed, tokens: tuple[int, ...], in_tower: bool
    ) -> None:
        """Keeps an adapter's gates for its auxiliary loss, if it has one."""
        if config.aux_loss != "none" and self.differentiable:
            self.record(loss_of_gates, GateRecord(adapter, config, routed, tokens, in_tower))

    def ids(self, config: RodeConfig, x: Tensor, side_by_side: bool = False) -> Tensor:
        """The ids that this adapter's router reads, int64, with x's leading dimensions or 1 in their place.

        Args:
            side_by_side: x has several rows for each of the batch, as an answer's beams have.

        Raises:
            ValueError: they were not given, do not fit the batch, or are none of the adapter's.
        """
        name = config.id_input
        assert name is not None, "called for adapters that read ids"
        ids = self.passes.current().side.get(name)
        if ids is None:
            raise ValueError(
                f"{name}: router_input={config.router_input!r} needs the {config.router_input} of each row; pass {name}=(batch,) "
                "int64 to the model or to generate, or enter rode.tuner.routing_inputs(model, ...)"
            )
        ids = ids.to(x.device)
        batch = x.shape[0]
        rows = 0 if ids.dim() == 0 else ids.shape[0]
        repeats = (
            rows > 0 and batch % rows == 0 and (batch == rows or side_by_side or not torch.is_grad_enabled())
        )
        if ids.is_floating_point() or not repeats:
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


def _set_mask(this: ForwardPass, mask: object, tokens: tuple[int, int] | None) -> None:
    if isinstance(mask, Tensor) and mask.dim() == 2:
        # With a key-value cache the mask covers the past too.
        this.mask = (mask if tokens is None else mask[:, -tokens[1] :]).bool()
    elif mask is not None:
        this.unreadable_mask = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__


@contextmanager
def given_inputs(context: ForwardContext, inputs: dict[str, Tensor | None]) -> Iterator[None]:
    """Within this context passes of the model have these side inputs, unless they are called with their own."""
    unknown = set(inputs) - set(SIDE_INPUTS)
    if unknown:
        raise TypeError(
            f"routing inputs: expected some of {', '.join(SIDE_INPUTS)}, got {', '.join(sorted(unknown))}"
        )
    before = context.given
    context.given = {**before, **{name: ids for name, ids in inputs.items() if ids is not None}}
    try:
        yield
    finally:
        context.given = before


def loss_of_gates(context: ForwardContext, records: list[GateRecord]) -> Tensor | None:
    """The weighted auxiliary loss of adapters' gates; counts closed gates for `HoldSparsity` on the way."""
    if not any(r.routed.gates.requires_grad or r.routed.logits.requires_grad for r in records):
        warn_without_gradient()
        return None
    this = context.passes.last
    mask = this.read_mask()
    held = [r for r in records if r.config.target_sparsity is not None]
    if held:
        context.target_sparsity = held[0].config.target_sparsity
        closed, total = sparsity(held, this.mask)
        context.closed = closed if context.closed is None else context.closed + closed
        context.gates_seen = total if context.gates_seen is None else context.gates_seen + total
    loss = mean_over_routers(records, mask, this.side.get("rode_task_ids"), context.l1_factor)
    warn_if_left_out(loss, records)
    return loss


def context_of(model: nn.Module) -> ForwardContext | None:
    """The context that a model's adapted layers share, or None where there is no such layer."""
    found = (getattr(module, "context", None) for module in model.modules())
    return next((context for context in found if isinstance(context, ForwardContext)), None)


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
    context = context_of(model)
    if context is None:
        raise ValueError("routing_inputs: the model has no RoDE layer; apply a RodeConfig first")
    inputs = {"rode_task_ids": task_ids, "rode_cluster_ids": cluster_ids, "rode_prompt_mask": prompt_mask}
    with given_inputs(context, inputs):
        yield
