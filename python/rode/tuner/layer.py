"""`RodeLayer`: a linear layer with a mixture of LoRA experts for each adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from rode.tuner.config import RodeConfig
from rode.tuner.context import ForwardContext
from rode.tuner.gating import Gated
from rode.tuner.ownership import may_write_into
from rode.tuner.recorder import GateRecorder
from rode.tuner.routers import compute_gates, init_router_, init_table_, with_universal
from rode.tuner.variants import Options, Variant, mixed_factors, operand, pick_variant


class _Like(TypedDict):
    """Device and dtype of a new parameter."""

    device: torch.device | None
    dtype: torch.dtype


class RodeLayer(Gated, BaseTunerLayer):
    """The parameters of each adapter, packed as the operation wants them.

    For an adapter of N experts with R = sum of ranks, of which N' have a logit (N, or N - 1 beside a universal expert):

    - `rode_A` (R, in_features), with shared_A (rank, in_features); `rode_B` (out_features, R);
    - where it has a router `rode_router` (N', in_features), for embedded ids (N', embedding_dim), and `rode_router_bias` (N',)
      where asked for; `rode_table` (ids, embedding_dim or N'), with router_input "constant" (1, N');
    - `rode_threshold` (1, in_features) and `rode_threshold_bias` (1,) for gate "threshold";
    - `rode_norm` and `rode_norm_bias` (R,) with norm_experts.

    With router_per="block" only the block's first layer has a router. All are float32 (float64 on a float64 base), whatever the
    base layer's dtype, so that a reload gives the same bits.
    """

    adapter_layer_names = (
        "rode_A",
        "rode_B",
        "rode_router",
        "rode_router_bias",
        "rode_table",
        "rode_threshold",
        "rode_threshold_bias",
        "rode_norm",
        "rode_norm_bias",
    )
    other_param_names = ("rode_ranks", "rode_scaling", "rode_config", "rode_shares_gates", "rode_variant")

    rode_A: nn.ParameterDict
    rode_B: nn.ParameterDict
    rode_norm: nn.ParameterDict
    rode_norm_bias: nn.ParameterDict
    rode_scaling: dict[str, tuple[float, ...]]
    rode_variant: dict[str, Variant]
    base_layer: nn.Module
    gate_recorder: GateRecorder | None  # set while GateStatistics are attached
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self.rode_ranks, self.rode_scaling, self.rode_config = {}, {}, {}
        self.rode_shares_gates, self.rode_variant = {}, {}
        self.context = ForwardContext()
        self.gate_recorder = self.block_pass = None
        self.module_name, self.block, self.in_tower = "", "", False
        self._disable_adapters = False
        self.merged_adapters = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None, "checked before a layer is replaced"
        assert out_features is not None, "checked before a layer is replaced"
        self.in_features, self.out_features = in_features, out_features

    def _parameters_of(self, adapter_name: str) -> Iterator[nn.Parameter]:
        for name in self.adapter_layer_names:
            found = getattr(self, name)
            if adapter_name in found:
                yield found[adapter_name]

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To where the base layer is; float64 if that is. PEFT's also rounds to other dtypes, and makes frozen ones trainable."""
        of_base, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for parameter in self._parameters_of(adapter_name):
            if not parameter.is_meta:
                dtype = torch.float64 if base_dtype == torch.float64 else parameter.dtype
                parameter.data = parameter.data.to(device or of_base or parameter.device, dtype)

    def round_adapter(self, adapter_name: str) -> None:
        """Adapters in the base layer's dtype, if that is a floating-point one."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for parameter in self._parameters_of(adapter_name):
            if dtype is not None and dtype.is_floating_point and not parameter.is_meta:
                parameter.data = parameter.data.to(dtype)

    def update_layer(
        self,
        adapter_name: str,
        ranks: tuple[int, ...],
        alpha: float,
        config: RodeConfig,
        inference_mode: bool = False,
        shares_gates: bool = False,
        **kwargs: Any,
    ) -> None:
        """Adds an adapter, or starts it anew; with shares_gates its gates are computed by another layer of the block."""
        base = self.get_base_layer()
        device, base_dtype = self._get_base_layer_device_and_dtype(base)
        like: _Like = {
            "device": device,
            "dtype": torch.float64 if base_dtype == torch.float64 else torch.float32,
        }
        experts, total = len(ranks), sum(ranks)
        self.rode_ranks[adapter_name] = ranks
        self.rode_scaling[adapter_name] = config.expert_scaling(ranks, alpha)
        self.rode_config[adapter_name] = config
        self.rode_shares_gates[adapter_name] = shares_gates
        rows = ranks[0] if config.shared_A else total
        self.rode_A[adapter_name] = nn.Parameter(torch.empty(rows, self.in_features, **like))
        self.rode_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, total, **like))
        if config.norm_experts and config.needs_router(experts):
            self.rode_norm[adapter_name] = nn.Parameter(torch.ones(total, **like))
            self.rode_norm_bias[adapter_name] = nn.Parameter(torch.zeros(total, **like))
        if config.needs_router(experts) and not shares_gates:
            self._add_router(adapter_name, config, config.routed_experts(experts), like)
        self.rode_variant[adapter_name] = pick_variant(config, experts, adapter_name in self.rode_router)
        self.reset_parameters(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _add_router(self, name: str, config: RodeConfig, routed: int, like: _Like) -> None:
        width: int | None = self.in_features
        if config.id_input or config.router_input == "constant":
            width = config.embedding_dim
            self.rode_table[name] = nn.Parameter(torch.empty(config.num_ids or 1, width or routed, **like))
        if width is not None and config.router_input != "constant":
            self.rode_router[name] = nn.Parameter(torch.empty(routed, width, **like))
            if config.router_bias:
                self.rode_router_bias[name] = nn.Parameter(torch.empty(routed, **like))
        if config.gate == "threshold":
            self.rode_threshold[name] = nn.Parameter(torch.empty(1, self.in_features, **like))
            self.rode_threshold_bias[name] = nn.Parameter(torch.empty(1, **like))

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, config: RodeConfig) -> None:
        """A as LoRA's, B at zero (at random without init_weights), the router as configured; under torch's generator."""
        # The bound depends on in_features alone, so one draw over the packed A is LoRA's draw for each expert.
        nn.init.kaiming_uniform_(self.rode_A[adapter_name], a=math.sqrt(5))
        if config.init_weights:
            self.rode_B[adapter_name].zero_()
        else:
            nn.init.kaiming_uniform_(self.rode_B[adapter_name], a=math.sqrt(5))
        if adapter_name in self.rode_router:
            bias = self.rode_router_bias.get(adapter_name)
            init_router_(self.rode_router[adapter_name], bias, config.router_init)
        if adapter_name in self.rode_table:
            init_table_(self.rode_table[adapter_name], not config.table_of_logits, config.router_init)
        if adapter_name in self.rode_threshold:
            init_router_(self.rode_threshold[adapter_name], self.rode_threshold_bias[adapter_name], "kaiming")

    def packed_A(self, adapter: str) -> Tensor:
        """A as (R, in_features), a shared one repeated for each expert."""
        A = self.rode_A[adapter]
        return A.repeat(len(self.rode_ranks[adapter]), 1) if self.rode_config[adapter].shared_A else A

    @torch.no_grad()
    def concatenate(self, adapters: Sequence[str], into: str) -> None:
        """Fills the adapter `into` with the experts of `adapters`, side by side."""
        self.rode_A[into].copy_(torch.cat([self.rode_A[name] for name in adapters]))
        self.rode_B[into].copy_(torch.cat([self.rode_B[name] for name in adapters], dim=1))
        if into in self.rode_router:
            self.rode_router[into].copy_(torch.cat([self.rode_router[name] for name in adapters]))
        if into in self.rode_router_bias:
            rows = [
                self.rode_router_bias.get(name, self.rode_A[name].new_zeros(len(self.rode_ranks[name])))
                for name in adapters
            ]
            self.rode_router_bias[into].copy_(torch.cat(rows))

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """The one matrix (out_features, in_features) that an adapter with constant gates adds, in the parameters' dtype."""
        A, B, config = self.packed_A(adapter), self.rode_B[adapter], self.rode_config[adapter]
        ranks = self.rode_ranks[adapter]
        gates = self._constant_gates(adapter, B)
        if config.combine == "factors":
            A, B = mixed_factors(A, B, gates[None], ranks[0])
            return self.rode_scaling[adapter][0] * (B @ A)
        factors = gates * B.new_tensor(self.rode_scaling[adapter])
        return (B * factors.repeat_interleave(torch.tensor(ranks, device=B.device))) @ A

    def _constant_gates(self, adapter: str, like: Tensor) -> Tensor:
        """(N,) gates that do not depend on the input."""
        config = self.rode_config[adapter]
        if adapter not in self.rode_table:
            return like.new_ones(len(self.rode_ranks[adapter]))
        gates = compute_gates(config, self.rode_table[adapter][0].to(like), training=False).gates
        return with_universal(gates) if config.universal_expert else gates

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raises ValueError for adapters whose gates depend on the input, before any weight is touched."""
        routed = [
            name
            for name in adapter_names
            if name in self.rode_config and not self.rode_config[name].constant_gates
        ]
        if routed:
            gates = ", ".join(sorted({self.rode_config[name].gate for name in routed}))
            raise ValueError(
                f"adapter {', '.join(map(repr, routed))}: its {gates} gates depend on the input, so it is no single weight and "
                "cannot be merged; keep it as an adapter, or train with gate='none' or router_input='constant'"
            )


class Linear(nn.Module, RodeLayer):
    """A linear layer, quantised or not, that adds the active adapters' mixtures to its output."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        ranks: tuple[int, ...],
        alpha: float,
        config: RodeConfig,
        shares_gates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        RodeLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(
            adapter_name,
            ranks,
            alpha,
            config,
            inference_mode=config.inference_mode,
            shares_gates=shares_gates,
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) to (..., out_features) in the base layer's output dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        block = self.block_pass
        result = (
            self.base_layer(x, *args, **kwargs)
            if block is None
            else block.base(self.module_name, self.base_layer, x, args, kwargs)
        )
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in self.active_adapters:
            if adapter in self.rode_A:
                result = self._add_mixture(adapter, x, result)
        return result

    def _add_mixture(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        inputs = _autocast(x)
        same = result.dtype == inputs.dtype
        owned = same and self.block_pass is None and may_write_into(result, self.base_layer)
        options: Options = {
            "ranks": self.rode_ranks[adapter],
            "scaling": self.rode_scaling[adapter],
            "dropout_p": self.rode_config[adapter].dropout if self.training else 0.0,
            "base": result if same else None,
            "inplace": owned,
        }
        A, B = operand(self.packed_A(adapter), inputs), operand(self.rode_B[adapter], inputs)
        y, gates = self.rode_variant[adapter].add(self, adapter, x, inputs, A, B, options)
        if gates is not None and self.gate_recorder is not None:
            self._tell(self.gate_recorder, adapter, gates)
        return y if same else result + y.to(result.dtype)

    def _tell(self, recorder: GateRecorder, adapter: str, gates: Tensor) -> None:
        if self.block_pass is None or self.block_pass.slot == 0:
            block = self.block_of_experts(adapter)
            if block is not None:
                assert block.whole is not None, "set when the first gates of the block were computed"
                gates = block.whole
            recorder.record(adapter, self.rode_ranks[adapter], gates.detach())

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters with constant gates into the base weight.

        Args:
            safe_merge: check for NaN before the weight is replaced.
            adapter_names: default: the active ones.

        Raises:
            ValueError: an adapter's gates depend on the input, or with safe_merge its weights are not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        self.check_mergeable(adapter_names)
        for adapter in adapter_names:
            if adapter not in self.rode_A:
                continue
            merged = self._shifted_base_weight(adapter, 1.0)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"adapter {adapter!r}: the merged weight is not finite; the adapter is broken"
                )
            self.set_base_weight(merged)
            self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            self.set_base_weight(self._shifted_base_weight(self.merged_adapters.pop(), -1.0))

    def _shifted_base_weight(self, adapter: str, sign: float) -> Tensor:
        weight, delta = self.get_base_weight(), self.get_delta_weight(adapter)
        return (weight.to(delta.dtype) + sign * delta).to(weight.dtype)  # rounded once

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Only constant gates are one matrix."""
        config = self.rode_config.get(adapter_name)
        return config is not None and config.constant_gates

    def __repr__(self) -> str:
        return "rode." + super().__repr__()

    def extra_repr(self) -> str:
        experts = ", ".join(
            f"{name}={self.rode_config[name].gate}{list(ranks)}" for name, ranks in self.rode_ranks.items()
        )
        return ", ".join(text for text in (experts, quantization_extra_repr(self)) if text)


def _autocast(x: Tensor) -> Tensor:
    """x as F.linear would see it."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))
