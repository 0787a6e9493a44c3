"""How an adapter of a layer comes by its gates: its own router, the block's, ids, or a sequence's prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rode.tuner.aux_losses import check_ids
from rode.tuner.block_experts import BlockPass
from rode.tuner.context import ForwardContext
from rode.tuner.recorder import GateRecorder
from rode.tuner.rounding import RoundedParameters, operand
from rode.tuner.routers import Routed, compute_gates, router_logits, with_universal
from rode_kernels.autocast import autocast_off

if TYPE_CHECKING:
    from rode.tuner.config import RodeConfig
    from rode.tuner.siblings import Siblings


@dataclass
class LayerInfo:
    """The facts about an adapted layer that its adapters need; one object, shared by the layer and its adapters.

    Attributes:
        module_name: the layer's name in the model. block: the name of the module that holds it.
        in_tower: the layer's tokens are a vision tower's, and not those of input_ids. of_cross_attention: so are these, and each
            row of the batch has as many rows of them, side by side.
        context: the state of the model's forward pass.
        block_pass: set where whole blocks are experts.
        gate_recorder: set while GateStatistics are attached.
        siblings: the adapted layers of `block`, where it has several.
    """

    module_name: str = ""
    block: str = ""
    in_tower: bool = False
    of_cross_attention: bool = False
    context: ForwardContext = field(default_factory=ForwardContext)
    block_pass: BlockPass | None = None
    gate_recorder: GateRecorder | None = None
    siblings: Siblings | None = None

    @property
    def other_tokens(self) -> bool:
        """Whether the layer's tokens are not those of input_ids, so that masks and labels say nothing of them."""
        return self.in_tower or self.of_cross_attention


class Gated:
    """The part of an `Adapter` that makes gates (..., N) of the layer's input (..., in_features)."""

    name: str
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    config: RodeConfig
    shares_gates: bool  # whether another layer of the block computes them
    router_weight: nn.Parameter | None
    router_bias: nn.Parameter | None
    table: nn.Parameter | None
    threshold_weight: nn.Parameter | None
    threshold_bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    info: LayerInfo
    training: bool  # the module's that this is part of
    rounded: RoundedParameters | None  # while the model generates
    _parameters: dict[str, nn.Parameter | None]

    def held(self, name: str) -> Any:
        """The parameter of this name, or None, without `nn.Module.__getattr__`, which takes ten times as long. FSDP's flat ones are
        plain attributes."""
        return self._parameters[name] if name in self._parameters else getattr(self, name)

    def operand(self, name: str, x: Tensor) -> Tensor:
        """The parameter of this name as the operation takes it beside x; while the model generates, rounded once for all tokens."""
        parameter: Tensor = self.held(name)
        if parameter.dtype == x.dtype:
            return parameter
        rounded = self.rounded  # another thread's `generate` may end in between
        if rounded is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return operand(parameter, x)
        return rounded.of(name, parameter, x)

    def gates(self, x: Tensor) -> Tensor:
        """Gates (..., N) for x (..., in_features), leading dimensions broadcasting; another layer's where the block shares them."""
        block = self.block_of_experts()
        if block is not None and (kept := block.gates(self.name)) is not None:
            return kept
        if self.shares_gates:
            return self._shared_gates(x)
        config = self.config
        routed = compute_gates(
            config,
            self._logits(x),
            training=self.training,
            threshold=self._threshold(x),
            mask=self._mask(x) if config.gate == "expert-choice" else None,
        )
        gates = with_universal(routed.gates) if config.universal_expert else routed.gates
        self.keep(routed, gates, x)
        if block is None:
            return gates
        assert config.top_k is not None, "checked with the configuration"
        return block.begin(self.name, routed, config.top_k)

    def block_of_experts(self) -> BlockPass | None:
        """The passes through the block, if this adapter's experts are the whole block."""
        return self.info.block_pass if self.config.expert_per == "block" else None

    def keeps_gates(self) -> bool:
        """Whether anybody reads what `keep` keeps."""
        config = self.config
        return config.aux_loss != "none" or config.router_per == "block"

    def reads_gates(self) -> bool:
        """Whether anybody reads the gates of a call."""
        return self.info.gate_recorder is not None or self.keeps_gates()

    def keep(self, routed: Routed, gates: Tensor, x: Tensor) -> None:
        """Keeps gates for the auxiliary loss, and for the block's other layers."""
        config = self.config
        self.info.context.record_gates(self.name, config, routed, tuple(x.shape[:-1]), self.info.other_tokens)
        if config.router_per == "block":
            self.info.context.block_gates[self.info.block, self.name] = gates

    def _shared_gates(self, x: Tensor) -> Tensor:
        gates = self.info.context.block_gates.get((self.info.block, self.name))
        if gates is None or any(n not in (1, m) for n, m in zip(gates.shape, x.shape[:-1], strict=False)):
            raise RuntimeError(
                f"{self.info.module_name}: router_per='block' takes the gates of the block's first adapted layer, which has not "
                "run on this input; use router_per='projection' for a model that calls its layers in another order"
            )
        return gates

    def _logits(self, x: Tensor) -> Tensor:
        """(..., N') in float32 (float64 for float64 x)."""
        config = self.config
        acc_dtype = torch.promote_types(x.dtype, torch.float32)
        router, bias, table = self.router_weight, self.router_bias, self.table
        if config.router_input in ("token", "sequence"):
            assert router is not None, "made with the adapter"
            by_token = config.router_input == "token"
            return router_logits(x, router, bias) if by_token else self._sequence_logits(x, router, bias)
        assert table is not None, "made with the adapter"
        if config.router_input == "constant":
            return table.to(acc_dtype).reshape(*(1,) * (x.dim() - 1), -1)
        assert config.id_input is not None, "the other inputs were dealt with"
        ids = self.info.context.ids(config, x, side_by_side=self.info.of_cross_attention)
        check_ids(config.id_input, ids, len(table), "num_ids")
        rows = table[ids]
        return rows.to(acc_dtype) if router is None else router_logits(rows, router, bias)

    def _sequence_logits(self, x: Tensor, router: Tensor, bias: Tensor | None) -> Tensor:
        """Logits of the mean input over the prompt's tokens: (batch, 1, N'). While an answer grows, those of its prompt."""
        if x.dim() != 3:
            raise ValueError(
                f"{self.info.module_name}: router_input='sequence' expects x of shape (batch, tokens, features), "
                f"got {tuple(x.shape)}"
            )
        context, key = self.info.context, (self.info.module_name, self.name)
        this = context.passes.current()
        if this.decoding:
            kept = context.kept_logits().get(key)
            if kept is None or kept.shape[0] != x.shape[0]:
                raise RuntimeError(
                    f"{self.info.module_name}: router_input='sequence' reads the prompt, "
                    "which this cache was not filled with by this adapter"
                )
            return kept
        prompt = None if self.info.other_tokens else this.read_prompt()
        acc_dtype = torch.promote_types(x.dtype, torch.float32)
        if prompt is None:
            weights = torch.ones(x.shape[:2], dtype=acc_dtype, device=x.device)
        else:
            weights = self._fit(prompt, x).to(x.device, acc_dtype)
        tokens = weights.sum(1, keepdim=True)
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling() and bool((tokens == 0).any()):
            raise ValueError(
                f"{self.info.module_name}: router_input='sequence' reads the prompt, and a row has none: labels learn every "
                "token of it; pass rode_prompt_mask"
            )
        weights = weights / tokens.clamp(min=1)
        with autocast_off(x.device.type):
            pooled = torch.bmm(weights[:, None], x.to(acc_dtype))
        logits = router_logits(pooled, router, bias)
        context.sequence_logits[key] = logits.detach()
        return logits

    def _threshold(self, x: Tensor) -> Tensor | None:
        """(..., 1): max_threshold * sigmoid(w x + b), AdaMoLE."""
        if self.threshold_weight is None:
            return None
        config = self.config
        most = config.max_threshold or 1.0 / config.routed_experts(len(self.ranks))
        return most * router_logits(x, self.threshold_weight, self.threshold_bias).sigmoid()

    def _mask(self, x: Tensor) -> Tensor | None:
        this = self.info.context.passes.current()
        if this.decoding:
            raise RuntimeError(
                "gate='expert-choice': experts choose among all tokens of a sequence, those to come included, so it cannot "
                "generate; it is a control for training and scoring"
            )
        if x.dim() != 3:
            raise ValueError(
                f"{self.info.module_name}: gate='expert-choice' expects x of shape (batch, tokens, features), got {tuple(x.shape)}"
            )
        mask = None if self.info.other_tokens else this.read_mask()
        return None if mask is None else self._fit(mask, x).to(x.device)

    def _fit(self, mask: Tensor, x: Tensor) -> Tensor:
        if mask.shape != x.shape[:-1]:
            raise ValueError(
                f"{self.info.module_name}: attention_mask is for tokens of shape {tuple(mask.shape)}, "
                f"but the layer saw {tuple(x.shape[:-1])}"
            )
        return mask
