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
from weakref import WeakKeyDictionary

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
        sequence_logits, block_gates: of this pass, by layer or block; the former stay with the key-value cache that it filled.
        l1_factor: what `HoldSparsity` multiplies the L1 loss by. closed, gates_seen: counts since it last read them, or None.
    """

    def __init__(self) -> None:
        self.side: dict[str, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.mask: Tensor | None = None
        self.prompt: Tensor | None = None
        self._told_prompt = True
        self.decoding = False
        self.records: list[GateRecord] | None = None
        self.sequence_logits: dict[tuple[str, str], Tensor] = {}
        self.block_gates: dict[tuple[str, str], Any] = {}
        self.generating: Tensor | None = None  # (batch, T) bool: the prompt that `generate` was called with
        self.unreadable_mask = False  # a mask was given that is not (batch, T)
        self._past: Any = None
        self._kept: WeakKeyDictionary[Any, dict[tuple[str, str], Tensor]] = WeakKeyDictionary()
        self.l1_factor = 1.0
        self.target_sparsity: float | None = None
        self.closed: Tensor | None = None
        self.gates_seen: Tensor | None = None
        self.handles: list[Any] = []
        self.attached = False  # whether the hooks on the model are set
        self._signature: inspect.Signature | None = None  # of the model's forward, read at the first pass

    def __getstate__(self) -> dict[str, Any]:
        """The state without what belongs to one pass or one process: a copied or pickled model starts afresh."""
        return {name: self.__dict__[name] for name in ("given", "l1_factor", "handles", "attached")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(Routing().__dict__ | state)

    def attach(self, model: nn.Module) -> None:
        """Sets the hooks on `model`, once."""
        if self.attached:
            return
        self.attached = True
        self.handles += [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.attached, self._signature = [], False, None

    def _before(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        self.side = {**self.given, **{name: kwargs.pop(name) for name in SIDE_INPUTS if name in kwargs}}
        self.side = {name: ids for name, ids in self.side.items() if ids is not None}
        if self._signature is None:
            self._signature = inspect.signature(model.forward)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        bound = {**bound, **bound.get("kwargs", {})}
        ids = bound.get("input_ids")
        ids = bound.get("inputs_embeds") if ids is None else ids
        mask, labels = bound.get("attention_mask"), bound.get("labels")
        past = bound.get("past_key_values")
        if past is None and hasattr(
            bound.get("cache"), "get_seq_length"
        ):  # its name from transformers 5.24 on
            past = bound["cache"]
        self._past = past
        held = 0 if past is None else int(past.get_seq_length())
        self.decoding = held > 0
        self.block_gates, self.sequence_logits = {}, {}
        tokens = None if ids is None else tuple(ids.shape[:2])
        self.mask = None
        two = isinstance(mask, Tensor) and mask.dim() == 2
        self.unreadable_mask = mask is not None and not two
        if two and tokens is not None:
            self.mask = mask[:, -tokens[1] :].bool()  # with a cache the mask covers the past too
        training = model.training and torch.is_grad_enabled()
        self._set_prompt(labels, tokens, held, training)
        self.records = [] if training else None
        return args, kwargs

    def _set_prompt(
        self, labels: Tensor | None, tokens: tuple[int, int] | None, held: int, training: bool
    ) -> None:
        given, self.prompt, self._told_prompt = self.side.get("rode_prompt_mask"), None, True
        if given is None and self.generating is not None:
            given = self.generating
            length = given.shape[1]
            # in pieces, of which a router would see one at a time
            self._told_prompt = held >= length or (held == 0 and tokens is not None and tokens[1] >= length)
        elif given is None:
            self._told_prompt = labels is not None or not training
        if given is not None and self._told_prompt and tokens is not None and not held:
            self.prompt = _fit_rows(given.bool(), tokens)
        elif given is None and labels is not None:
            self.prompt = labels == IGNORE
        if self.prompt is None:
            self.prompt = self.mask
        elif self.mask is not None:
            self.prompt = self.prompt & self.mask

    def read_prompt(self) -> Tensor | None:
        """The prompt's tokens, (batch, T) bool, for a router that reads them; None for all.

        Raises:
            ValueError: they cannot be told from what the model was called with.
        """
        if not self._told_prompt:
            raise ValueError(
                "router_input='sequence' reads the prompt: in training pass labels or rode_prompt_mask to the model, and in "
                "generation do not fill the cache in pieces (prefill_chunk_size)"
            )
        return self.read_mask() if self.prompt is None else self.prompt

    def read_mask(self) -> Tensor | None:
        """What is not padding, (batch, T) bool; None for all.

        Raises:
            ValueError: a mask was given in which padding cannot be told.
        """
        if self.unreadable_mask:
            raise ValueError(
                "attention_mask: expected shape (batch, tokens), so that padding can be left out; got another one (as with a "
                "static cache or a mask of your own)"
            )
        return self.mask

    def kept_logits(self) -> dict[tuple[str, str], Tensor]:
        """Logits that the prompt of the running pass's key-value cache led to."""
        return {} if self._past is None else self._kept.get(self._past, {})

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self.sequence_logits:
            new = hasattr(output, "cache")  # from transformers 5.24 on, which warns of the older name
            cache = output.cache if new else getattr(output, "past_key_values", None)
            if cache is not None:
                self._kept[cache] = self.sequence_logits
        self._past, self.sequence_logits = None, {}
        records, self.records = self.records, None
        if not torch.is_grad_enabled():  # no backward will compute a layer again
            self.side, self.prompt, self.mask = {}, None, None
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
        by_adapter: dict[str, list[GateRecord]] = {}
        for record in records:
            by_adapter.setdefault(record.adapter, []).append(record)
        total, mask = None, self.read_mask()
        for group in by_adapter.values():
            config = group[0].config
            losses = [auxiliary_loss(r, mask, self.side.get("rode_task_ids")) for r in group]
            first = losses[0]
            weight = config.aux_weight * (self.l1_factor if config.target_sparsity is not None else 1.0)
            mean = torch.stack([x.to(first.device, first.dtype) for x in losses]).mean() * weight
            total = mean if total is None else total + mean.to(total.device, total.dtype)
        return total

    def record(
        self, adapter: str, config: RodeConfig, routed: Any, tokens: tuple[int, ...], in_tower: bool
    ) -> None:
        """Keeps gates for the auxiliary loss; not outside of a training pass, as when checkpointing computes a layer again."""
        if self.records is not None and config.aux_loss != "none":
            self.records.append(GateRecord(adapter, config, routed, tokens, in_tower))

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
        rows = 0 if ids.dim() == 0 else ids.shape[0]
        repeats = rows > 0 and batch % rows == 0 and (batch == rows or not torch.is_grad_enabled())
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
    if output.get("aux_loss") is not None:
        raise ValueError(
            "aux_loss: the model has an auxiliary loss of its own (output_router_logits); turn it off, or the adapter's"
        )
    if getattr(output, "loss", None) is not None:
        output["loss"] = output.loss + _share(aux, given).to(output.loss.device)
    output["aux_loss"] = aux
    return output


def _fit_rows(prompt: Tensor, tokens: tuple[int, int]) -> Tensor:
    """A prompt mask (rows, P) for a pass of `tokens` (batch, T): rows repeated for beams, and nothing of it in an answer so far."""
    rows, length = prompt.shape
    if tokens[0] % rows or tokens[1] < length:
        raise ValueError(f"rode_prompt_mask: expected shape {tokens}, got {tuple(prompt.shape)}")
    prompt = prompt.repeat_interleave(tokens[0] // rows, dim=0)
    return nn.functional.pad(prompt, (0, tokens[1] - length))


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
