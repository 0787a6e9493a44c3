"""MoE-LLaVA (arXiv 2401.15947): feed-forward blocks of the language model become mixtures of copies of themselves.

A token's router logits are `Wr x`; its first expert is the largest. In training the second is drawn from the softmax over the
others (the largest of logits plus Gumbel noise). An expert takes at most `capacity` tokens of a batch: first choices before
second ones, each in the order of the tokens. The gates of the experts that took a token are divided by their sum; a token that
none took passes through the residual alone. The auxiliary loss is `E sum_e m_e c_e`: m_e the mean softmax value of expert e,
c_e the share of tokens whose first choice it is, summed over the layers.

All this is DeepSpeed 0.9.5's top-2 gating, as MoE-LLaVA calls it. What differs here:
- Padding is left out: it takes no capacity, counts in no mean, and gets 0. There it competes like any token.
- At inference the second expert is the second largest and, unless asked for, no capacity limits it: answers depend neither on
  chance nor on neighbours in the batch. There the second is drawn at inference too, and capacity has the factor 2, which with 4
  experts is every token, so that none is dropped either.
- Only the mixtures train. Its published scripts select FFN weights by name, which trains the dense ones between them as well.
- top_k other than 2 follows the same rules; with 1 the gate is the softmax value itself, or the router would not learn.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rode.finite import refuse_not_finite
from rode.tuner.context import ForwardContext
from rode.tuner.routers import router_logits
from rode_food.atomic import write_json, written_aside

MOE_CONFIG = "moe_config.json"
MOE_WEIGHTS = "moe_model.safetensors"


@dataclass(frozen=True)
class MoeConfig:
    """The choices of MoE-LLaVA; the defaults are those of its published scripts.

    Args:
        num_experts: copies of the FFN in each block.
        top_k: experts that a token asks for.
        capacity_factor: in training an expert takes at most ceil(tokens / num_experts * top_k * capacity_factor) tokens; None for
            no limit.
        eval_capacity_factor: the same at inference.
        min_capacity: the least capacity.
        sample_second: draw the choices after the first in training; False takes the next largest.
        aux_loss: weight of the load-balance loss.
        blocks: numbers of the language model's blocks; None for every second one from the first.

    Raises:
        TypeError, ValueError: naming the field, what it got and what was wanted.
    """

    num_experts: int = 4
    top_k: int = 2
    capacity_factor: float | None = 1.5
    eval_capacity_factor: float | None = None
    min_capacity: int = 0
    sample_second: bool = True
    aux_loss: float = 0.01
    blocks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name, least in (("num_experts", 2), ("top_k", 1), ("min_capacity", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k: expected at most num_experts={self.num_experts}, got {self.top_k}")
        for name in ("capacity_factor", "eval_capacity_factor", "aux_loss"):
            value = getattr(self, name)
            none = value is None and name != "aux_loss"
            if not none and (
                isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0
            ):
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
            if value == 0 and name != "aux_loss":
                raise ValueError(f"{name}: 0 would drop every token; give null for no limit")
        if self.blocks is not None:
            if isinstance(self.blocks, str) or not isinstance(self.blocks, Sequence) or not self.blocks:
                raise TypeError(f"blocks: expected numbers of blocks, such as (0, 2, 4), got {self.blocks!r}")
            object.__setattr__(self, "blocks", tuple(self.blocks))


class MoeFeedForward(nn.Module):
    """A mixture of copies of one FFN. The router is float32 (float64 on a float64 FFN).

    Each forward waits for the device once, for the number of tokens of each expert.

    Args:
        dense: the FFN, (..., hidden) to (..., hidden).
        config: see [`MoeConfig`].
        hidden_size: width of its input.
        context: tells the layer of padding, and takes what the auxiliary loss is made of.
    """

    def __init__(
        self, dense: nn.Module, config: MoeConfig, hidden_size: int, context: ForwardContext
    ) -> None:
        super().__init__()
        first = next(dense.parameters())
        acc_dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.config = config
        self.context = context
        self.loss = SumOfLayers(config.aux_loss)
        self.router = nn.Linear(
            hidden_size, config.num_experts, bias=False, device=first.device, dtype=acc_dtype
        )
        self.experts = nn.ModuleList(copy.deepcopy(dense) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, T, hidden) to the same shape and dtype."""
        k, E = self.config.top_k, self.config.num_experts
        valid = self._valid(x)
        tokens = x.flatten(0, -2)  # (S, hidden)
        valid = tokens.new_ones(len(tokens), dtype=torch.bool) if valid is None else valid.flatten()
        logits = router_logits(tokens, self.router.weight, None)  # (S, E)
        chosen, kept = self._choose(logits.detach(), valid)  # (S, k) both
        probabilities = logits.softmax(-1)
        if self.training:
            self._record((probabilities, chosen[:, 0], valid))
        gates = torch.where(kept, probabilities.gather(-1, chosen), 0)  # (S, k)
        if k > 1:
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(torch.finfo(gates.dtype).eps)
        # Pairs (token, choice) in the order of their experts; those that no expert took come last.
        expert = torch.where(kept, chosen, E).flatten()
        order = expert.argsort(stable=True)
        counts = expert.bincount(minlength=E + 1)[:E].tolist()
        parts = order[: sum(counts)].split(counts)
        # An expert without a token runs on no rows, so that its parameters get gradients of zero: DDP waits for them.
        outputs = [self._run(e, tokens[part // k]) for e, part in zip(self.experts, parts, strict=True)]
        # Every pair has a place of its own: no sum over places that coincide, whose order a GPU would leave open.
        pairs = tokens.new_zeros(len(tokens) * k, x.shape[-1])
        pairs = pairs.index_copy(0, order[: sum(counts)], torch.cat(outputs).to(x.dtype))
        y = torch.einsum("sk,skh->sh", gates.to(x.dtype), pairs.unflatten(0, (-1, k)))
        y = y.reshape(x.shape).to(x.dtype)
        self.context.passes.note(y, self.context.passes.current())
        return y

    def _valid(self, x: Tensor) -> Tensor | None:
        """A mask of x's tokens (batch, T, ...) that are no padding: bool (batch, T), or None."""
        # In evaluation a mask that does not tell padding, such as a static cache's, counts as none.
        this = self.context.passes.current()
        mask = this.read_mask() if self.training else this.mask
        if mask is None:
            return None
        if mask.shape != x.shape[:2]:
            raise ValueError(
                f"MoE-LLaVA: a layer saw tokens of shape {tuple(x.shape[:2])}, but attention_mask has shape {tuple(mask.shape)}"
            )
        return mask.to(x.device)

    def _record(self, gates: tuple[Tensor, Tensor, Tensor]) -> None:
        context = self.context
        if context.records is not None and context.differentiable and not torch.is_grad_enabled():
            raise ValueError(
                "MoE-LLaVA: reentrant gradient checkpointing would drop the auxiliary loss's gradient; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        context.record(self.loss, gates)

    @torch.no_grad()
    def _choose(self, logits: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Experts that each token asks for (S, k), and whether they take it, bool (S, k)."""
        k, E = self.config.top_k, self.config.num_experts
        first = logits.argmax(-1, keepdim=True)
        rest = logits
        if k > 1 and self.training and self.config.sample_second:
            rest = logits - torch.empty_like(logits).exponential_().log()
        rest = rest.scatter(-1, first, -torch.inf)
        chosen = torch.cat((first, rest.topk(k - 1, dim=-1).indices), dim=-1)  # (S, k)
        kept = valid[:, None].expand_as(chosen)
        factor = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        if factor is None:
            return chosen, kept
        capacity = (valid.sum().double() / E * (k * factor)).ceil().clamp_min(self.config.min_capacity)
        # The queue at each expert: all first choices before all second ones.
        asked = torch.nn.functional.one_hot(chosen.T.flatten(), E) * kept.T.reshape(-1, 1)  # (k S, E)
        place = (asked.cumsum(0) * asked).sum(-1).unflatten(0, (k, -1)).T  # (S, k), from 1; 0 for padding
        return chosen, kept & (place <= capacity)

    def _run(self, expert: nn.Module, rows: Tensor) -> Tensor:
        """Float32 experts compute in the dtype of 16-bit rows, with gradients in float32."""
        mixed = next(expert.parameters()).dtype == torch.float32 and rows.dtype in (
            torch.bfloat16,
            torch.float16,
        )
        if not mixed:
            return expert(rows)
        with torch.autocast(rows.device.type, dtype=rows.dtype):
            return expert(rows)


def load_balance_loss(probabilities: Tensor, first: Tensor, valid: Tensor) -> Tensor:
    """`E sum_e m_e c_e` of one layer; 1 where all experts have equal loads.

    Args:
        probabilities: softmax values (S, E). first: the first choices (S,). valid: bool (S,), which tokens count.
    """
    E = probabilities.shape[-1]
    tokens = valid.sum().clamp_min(1)
    mean = torch.where(valid[:, None], probabilities, 0).sum(0) / tokens
    share = (torch.nn.functional.one_hot(first, E) * valid[:, None]).sum(0).to(mean.dtype) / tokens
    return E * (mean * share).sum()


def _decoder(model: nn.Module) -> Any:
    """The language model with its list of blocks, in a LLaVA or a plain decoder; each architecture has a class of its own."""
    inner = getattr(model, "model", model)
    decoder = getattr(inner, "language_model", inner)
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(
            f"model: expected a LLaVA or a decoder of transformers, with blocks in `layers`, got {type(model).__name__}"
        )
    return decoder


def moe_layers(model: nn.Module) -> dict[str, MoeFeedForward]:
    """The mixtures of a converted model by name; empty for any other."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoeFeedForward)}


def convert_to_moe(
    model: nn.Module,
    config: MoeConfig | None = None,
    *,
    dtype: torch.dtype | None = torch.float32,
    **fields: Any,
) -> ForwardContext:
    """Replaces FFNs by mixtures, in place, and freezes all the rest (stage 3 of MoE-LLaVA).

    Args:
        model: a LlavaForConditionalGeneration, or a plain decoder with a head (LlamaForCausalLM).
        config: see [`MoeConfig`]; or its fields as keywords.
        dtype: what the experts are held in (a float64 model keeps float64); None leaves them as the FFN is.

    Returns:
        What adds the auxiliary loss to the model's output; it is attached.

    Raises:
        ValueError: the model has mixtures already, or no such block.
    """
    if config is not None and fields:
        raise ValueError(f"config: give a MoeConfig or its fields, got both ({', '.join(fields)})")
    config = MoeConfig(**fields) if config is None else config
    decoder = _decoder(model)
    if moe_layers(model):
        raise ValueError("model: it has mixtures already; convert a fresh one")
    count = len(decoder.layers)
    blocks = range(0, count, 2) if config.blocks is None else config.blocks
    if len(set(blocks)) != len(blocks) or not all(isinstance(b, int) and 0 <= b < count for b in blocks):
        raise ValueError(f"blocks: expected distinct numbers from 0 to {count - 1}, got {config.blocks}")
    context = ForwardContext.on(model)
    context.needed = True
    model.requires_grad_(False)
    for block in blocks:
        dense = decoder.layers[block].mlp
        layer = MoeFeedForward(dense, config, decoder.config.hidden_size, context)
        if dtype is not None and next(dense.parameters()).dtype != torch.float64:
            layer.experts.to(dtype)
        layer.requires_grad_(True).train(dense.training)
        decoder.layers[block].mlp = layer
    return context


@dataclass(frozen=True)
class SumOfLayers:
    """The auxiliary loss of a model: the layers' losses, summed and weighted."""

    weight: float

    def __call__(self, context: ForwardContext, records: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        losses = [load_balance_loss(*record) for record in records]
        return self.weight * reduce(torch.add, (loss.to(losses[0].device) for loss in losses))


def save_moe(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Writes the mixtures, routers and experts, as moe_model.safetensors and moe_config.json.

    Raises:
        ValueError: the model was not converted.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError("model: it has no mixture to save; convert_to_moe makes them")
    state = {
        f"{name}.{key}": tensor.detach().contiguous()
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }
    with written_aside(Path(directory) / MOE_WEIGHTS) as aside:
        save_file(state, aside, metadata={"format": "pt"})
    config = asdict(next(iter(layers.values())).config)
    write_json(Path(directory) / MOE_CONFIG, {"method": "moe-llava", **config})


def load_moe(model: nn.Module, directory: str | os.PathLike[str]) -> ForwardContext:
    """Converts a fresh base model and gives it the saved mixtures, in the dtype in which they were saved.

    Returns:
        As `convert_to_moe`.

    Raises:
        FileNotFoundError: no mixtures there. ValueError: they are another model's.
    """
    files = [Path(directory) / name for name in (MOE_CONFIG, MOE_WEIGHTS)]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{directory}: no MoE-LLaVA here ({file.name} is missing)")
    values = json.loads(files[0].read_text(encoding="utf-8"))
    if values.pop("method", None) != "moe-llava":
        raise ValueError(f"{files[0]}: expected method 'moe-llava'; this is another method's file")
    if values.get("blocks") is not None:
        values["blocks"] = tuple(values["blocks"])
    state = load_file(files[1])
    experts = next(tensor for name, tensor in state.items() if ".experts." in name)
    context = convert_to_moe(model, MoeConfig(**values), dtype=experts.dtype)
    load_moe_weights(model, directory)
    return context


def load_moe_weights(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Gives a converted model the weights that `save_moe` wrote.

    Raises:
        ValueError: they are another model's.
    """
    files = [Path(directory) / name for name in (MOE_CONFIG, MOE_WEIGHTS)]
    state = load_file(files[1])
    refuse_not_finite(state, str(files[1]))
    for name, layer in moe_layers(model).items():
        own = {f"{name}.{key}": tensor for key, tensor in layer.state_dict().items()}
        wrong = [key for key, t in own.items() if key not in state or state[key].shape != t.shape]
        if wrong:
            got = tuple(state[wrong[0]].shape) if wrong[0] in state else "nothing"
            raise ValueError(
                f"{files[1]}: the model's {wrong[0]} has shape {tuple(own[wrong[0]].shape)}, the file {got}; it was saved from "
                "another base model"
            )
        layer.load_state_dict({key: state.pop(f"{name}.{key}") for key in layer.state_dict()})
    if state:
        raise ValueError(
            f"{files[1]}: the model has no {next(iter(state))}; it was saved from another base model"
        )
