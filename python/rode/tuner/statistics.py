"""How far the gates open: by layer, expert and kind of token, counted on the device while a model runs."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rode.tuner.aux_losses import IGNORE
from rode.tuner.context import ForwardCall, ForwardContext
from rode.tuner.layer import RodeLayer
from rode.tuner.recorder import GateRecorder, TokenKinds
from rode.tuner.targets import towers, under

KINDS = ("image", "text")
ANSWER_KINDS = ("image", "prompt", "answer")


@dataclass(frozen=True)
class LayerGates:
    """Gates of one adapted layer.

    Attributes:
        name: of the layer. block: number of its transformer block (the first number in the name), or None.
        adapter, ranks: whose gates, and the rank of each expert.
        tokens: tokens seen, by kind ("image", "text", "all"; with `answers` "image", "prompt", "answer", "all").
        open_rate: by kind, for each expert the share of tokens whose gate is above 0; None where no such token was seen.
        mean_gate: by kind, for each expert the mean gate over all those tokens, closed ones included; None likewise.
    """

    name: str
    block: int | None
    adapter: str
    ranks: tuple[int, ...]
    tokens: dict[str, int]
    open_rate: dict[str, tuple[float, ...] | None]
    mean_gate: dict[str, tuple[float, ...] | None]


@dataclass(frozen=True)
class ExampleGates:
    """Sums over the tokens of one adapted layer, example by example in the order they were run; float64 on the host.

    Attributes:
        name, block, adapter, ranks: as in `LayerGates`. kinds: what the second dimension stands for.
        tokens: (examples, kinds). open, gates: (examples, kinds, N), numbers of open gates and sums of gates.
        zeros: (examples, kinds) gates that are exactly 0. closed: tokens whose gates are all 0.
        effective: summed effective number of experts, the exp of the entropy of a token's normalised gates; 0 for a closed token.
        carriers: summed fewest experts that carry 90 % of a token's gates; likewise.
    """

    name: str
    block: int | None
    adapter: str
    ranks: tuple[int, ...]
    kinds: tuple[str, ...]
    tokens: Tensor
    open: Tensor
    gates: Tensor
    zeros: Tensor
    effective: Tensor
    carriers: Tensor
    closed: Tensor


@dataclass(frozen=True)
class GateReport:
    """The counts, on the host.

    Attributes:
        layers: one entry for each adapted layer and adapter that saw a token, in the model's order.
    """

    layers: tuple[LayerGates, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def heat_map(
        self, value: str = "mean_gate", kind: str = "all"
    ) -> tuple[list[int], list[list[float | None]]]:
        """A row for each transformer block, a column for each expert (Fig. 6 of the paper): the mean over the block's layers.

        Args:
            value: "mean_gate" or "open_rate". kind: a key of `LayerGates.tokens`.

        Returns:
            The blocks' numbers, and the rows in their order. Layers outside of blocks are left out. Where layers of a block have
            fewer experts than others, the mean is over those that have the expert.
        """
        blocks: dict[int, list[tuple[float, ...]]] = {}
        for layer in self.layers:
            if layer.block is not None and (row := getattr(layer, value)[kind]) is not None:
                blocks.setdefault(layer.block, []).append(row)
        numbers = sorted(blocks)
        width = max((len(row) for rows in blocks.values() for row in rows), default=0)
        return numbers, [
            [_mean_or_none([r[i] for r in blocks[n] if i < len(r)]) for i in range(width)] for n in numbers
        ]

    def scalars(self, prefix: str = "gates") -> dict[str, float]:
        """Means over layers for a training log: open rate by kind, and open rate and gate of each expert over all tokens."""
        out: dict[str, float] = {}
        for kind in dict.fromkeys(kind for layer in self.layers for kind in layer.tokens if kind != "all"):
            rows = [row for layer in self.layers if (row := layer.open_rate[kind]) is not None]
            if rows:
                out[f"{prefix}/open_{kind}"] = _mean([rate for row in rows for rate in row])
        for value, short in (("open_rate", "open"), ("mean_gate", "mean")):
            columns: dict[str, list[float]] = {}
            for layer in self.layers:
                for i, number in enumerate(getattr(layer, value)["all"] or ()):
                    columns.setdefault(f"{prefix}/{short}_expert{i}_rank{layer.ranks[i]}", []).append(number)
            out |= {name: _mean(numbers) for name, numbers in columns.items()}
        return out


class GateStatistics:
    """Open rate and mean gate by layer, expert and kind of token (image, text; padding counts as neither).

    Counting adds a few small device operations to each adapted layer and never waits for the device; `report` does. Layers that
    gradient checkpointing runs a second time are counted once. Under DDP each process counts its own tokens.

    Args:
        image_token_id: the placeholder of image tokens in input_ids. Default: what the model's configuration says; a model
            that has none has text tokens only.
        answers: tell the answer's tokens from the prompt's by the `labels` that the model is called with: kinds are then
            `ANSWER_KINDS`.
        by_example: keep sums for each row of each batch, and how its tokens mix the experts, for `examples`; they stay on the
            device until then, some 8 (1 + 2 N + 4) bytes for each example, layer and kind.

    Example:
        ```py
        >>> with GateStatistics().attach(model) as statistics:
        ...     model.generate(**inputs)
        >>> statistics.report().heat_map()
        ```
    """

    def __init__(
        self, image_token_id: int | None = None, *, answers: bool = False, by_example: bool = False
    ) -> None:
        self.image_token_id = image_token_id
        self.kinds = ANSWER_KINDS if answers else KINDS
        self.by_example = by_example
        self._kinds = TokenKinds()
        self._layers: list[tuple[RodeLayer, GateRecorder]] = []
        self._context: ForwardContext | None = None  # while attached

    def attach(self, model: nn.Module) -> GateStatistics:
        """Starts counting from zero in `model` (a PeftModel, or a model with adapters injected).

        Raises:
            ValueError: the model has no RoDE layer, or statistics are attached already.
        """
        if self._context is not None:
            raise ValueError("GateStatistics: already attached; call detach() first")
        get_base_model = getattr(model, "get_base_model", None)
        if get_base_model is not None:  # generate() enters below a PeftModel's own forward
            model = get_base_model()
        layers = [(name, module) for name, module in model.named_modules() if isinstance(module, RodeLayer)]
        if not layers:
            raise ValueError("GateStatistics: the model has no RoDE layer; apply a RodeConfig first")
        if any(layer.info.gate_recorder is not None for _, layer in layers):
            raise ValueError(
                "GateStatistics: other statistics are attached to this model; detach() those first"
            )
        if self.image_token_id is None:
            config = getattr(model, "config", None)
            names = ("image_token_id", "image_token_index")
            self.image_token_id = next(
                (v for n in names if (v := getattr(config, n, None)) is not None), None
            )
        roots = towers(model)
        self._layers = []
        for name, layer in layers:
            cross = layer.info.of_cross_attention
            in_tower = under(name, roots) is not None
            recorder = GateRecorder(name, self._kinds, in_tower or cross, self.by_example, side_by_side=cross)
            layer.info.gate_recorder = recorder
            self._layers.append((layer, recorder))
        self._context = ForwardContext.listen(model, self)
        return self

    def begin(self, call: ForwardCall) -> None:
        """Settles what each token of the pass is."""
        given = call.given
        self._begin(given.get("input_ids"), given.get("attention_mask"), given.get("labels"))

    def end(self) -> None:
        """Nothing counts outside of a pass, as when checkpointing computes a layer again."""
        self._kinds.rows = None

    @torch.no_grad()
    def _begin(self, input_ids: Tensor | None, attention_mask: Tensor | None, labels: Tensor | None) -> None:
        if input_ids is None:
            raise ValueError(
                "GateStatistics: the model was called without input_ids, so image and text tokens cannot be told apart; pass "
                "input_ids, or detach()"
            )
        token = self.image_token_id
        image = torch.zeros_like(input_ids).bool() if token is None else input_ids == token
        if self.kinds == KINDS:
            rows = torch.stack((image, ~image))
        elif labels is None:
            raise ValueError(
                "GateStatistics: answers=True tells answers by labels, and the model was called without; pass labels (-100 on "
                "prompt and padding), or leave answers out"
            )
        else:
            answer = labels != IGNORE
            rows = torch.stack((image & ~answer, ~image & ~answer, answer))
        if attention_mask is not None:
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                raise ValueError(
                    "GateStatistics: expected attention_mask of shape (batch, tokens), got "
                    f"{getattr(attention_mask, 'shape', type(attention_mask).__name__)}; use a dynamic cache, or detach()"
                )
            # With a key-value cache the mask covers the past too.
            rows = rows & attention_mask[:, -input_ids.shape[1] :].bool()
        self._kinds.rows = rows

    def detach(self) -> None:
        """Stops counting and leaves the model as it was; the counts stay."""
        if self._context is not None:
            self._context.stop_listening(self)
        for layer, _ in self._layers:
            layer.info.gate_recorder = None
        self._context = None
        self._kinds.rows = None

    def reset(self) -> None:
        """Sets all counts to zero."""
        for _, recorder in self._layers:
            recorder.sums.clear()
            recorder.examples.clear()

    def state(self) -> dict[str, Any]:
        """The sums so far as JSON values, exactly, for `restore`; not with `by_example`."""
        return {
            recorder.name: {
                adapter: {"ranks": list(recorder.ranks[adapter]), "sums": sums.tolist()}
                for adapter, sums in recorder.sums.items()
            }
            for _, recorder in self._layers
            if recorder.sums
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on counting from a `state` of the same model, in place of the counts so far.

        Raises:
            ValueError: it has layers that this model lacks.
        """
        recorders = {recorder.name: (layer, recorder) for layer, recorder in self._layers}
        if surplus := sorted(state.keys() - recorders.keys()):
            raise ValueError(f"GateStatistics: the counts are of another model: it has no layer {surplus[0]}")
        self.reset()
        for name, adapters in state.items():
            layer, recorder = recorders[name]
            for adapter, held in adapters.items():
                recorder.ranks[adapter] = tuple(held["ranks"])
                device = layer.adapter(adapter).A.device
                recorder.sums[adapter] = torch.tensor(held["sums"], dtype=torch.float64, device=device)

    def __enter__(self) -> GateStatistics:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def report(self, all_processes: bool = False) -> GateReport:
        """Fetches the counts from the device; may be called while attached, and after.

        Args:
            all_processes: add up the counts of all processes of torch.distributed's default group, each of which has to call this.
        """
        found = [
            (recorder.name, adapter, recorder.ranks[adapter], sums)
            for _, recorder in self._layers
            for adapter, sums in recorder.total().items()
        ]
        counts = [sums for *_, sums in found]
        if all_processes and dist.is_available() and dist.is_initialized():
            counts = _added_up(counts)
        return GateReport(
            tuple(
                _layer_gates(name, adapter, ranks, self.kinds, sums.cpu())
                for (name, adapter, ranks, _), sums in zip(found, counts, strict=True)
            )
        )

    def examples(self) -> tuple[ExampleGates, ...]:
        """With `by_example`: one entry for each adapted layer and adapter that saw a token, fetched from the device."""
        return tuple(
            _example_gates(recorder.name, adapter, recorder.ranks[adapter], self.kinds, parts)
            for _, recorder in self._layers
            for adapter, parts in recorder.examples.items()
        )


def _block(name: str) -> int | None:
    number = re.search(r"\.(\d+)\.", name)
    return None if number is None else int(number[1])


def _example_gates(
    name: str, adapter: str, ranks: tuple[int, ...], kinds: tuple[str, ...], parts: list[Tensor]
) -> ExampleGates:
    sums = torch.cat(parts, dim=1).transpose(0, 1).cpu()  # (examples, kinds, 1 + 2 N + 4)
    tokens, opened, gates, mixing = sums.split((1, len(ranks), len(ranks), 4), dim=-1)
    return ExampleGates(
        name, _block(name), adapter, ranks, kinds, tokens[..., 0], opened, gates, *mixing.unbind(-1)
    )


def _added_up(counts: list[Tensor]) -> list[Tensor]:
    """The sums of all processes' tensors, in one exchange."""
    if not counts:
        return counts
    device = counts[0].device
    flat = torch.cat([sums.to(device).flatten() for sums in counts])
    dist.all_reduce(flat)
    parts = flat.split([sums.numel() for sums in counts])
    return [part.view_as(sums) for part, sums in zip(parts, counts, strict=True)]


def _layer_gates(
    name: str, adapter: str, ranks: tuple[int, ...], kinds: tuple[str, ...], sums: Tensor
) -> LayerGates:
    experts = len(ranks)
    by_kind = dict(zip((*kinds, "all"), (*sums, sums.sum(0)), strict=True))
    shares = {kind: (row[1:] / row[0]).tolist() if row[0] > 0 else None for kind, row in by_kind.items()}
    return LayerGates(
        name=name,
        block=_block(name),
        adapter=adapter,
        ranks=ranks,
        tokens={kind: int(row[0]) for kind, row in by_kind.items()},
        open_rate={kind: None if row is None else tuple(row[:experts]) for kind, row in shares.items()},
        mean_gate={kind: None if row is None else tuple(row[experts:]) for kind, row in shares.items()},
    )


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _mean_or_none(numbers: list[float]) -> float | None:
    return _mean(numbers) if numbers else None
