"""`RodeLayer`: a linear layer with a mixture of LoRA experts for each adapter."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn

from rode.tuner.config import RodeConfig
from rode.tuner.routers import COMPUTED_GATES, init_router_, router_logits
from rode_kernels import gated_mixture, rectified_mixture

if TYPE_CHECKING:
    from rode.tuner.statistics import GateRecorder


class RodeLayer(BaseTunerLayer):
    """The parameters of each adapter, packed as the operation wants them.

    For an adapter of N experts with R = sum of ranks: `rode_A` (R, in_features), `rode_B` (out_features, R), `rode_router`
    (N, in_features) unless its gate is "none", `rode_router_bias` (N,) where asked for. All are float32 (float64 on a
    float64 base), whatever the base layer's dtype, so that a reload gives the same bits.
    """

    adapter_layer_names = ("rode_A", "rode_B", "rode_router", "rode_router_bias")
    other_param_names = ("rode_ranks", "rode_scaling", "rode_dropout", "rode_gate")

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self.rode_A = nn.ParameterDict()
        self.rode_B = nn.ParameterDict()
        self.rode_router = nn.ParameterDict()
        self.rode_router_bias = nn.ParameterDict()
        self.rode_ranks: dict[str, tuple[int, ...]] = {}
        self.rode_scaling: dict[str, tuple[float, ...]] = {}
        self.rode_dropout: dict[str, float] = {}
        self.rode_gate: dict[str, str] = {}
        self.gate_recorder: GateRecorder | None = None  # set while GateStatistics are attached
        self._disable_adapters = False
        self.merged_adapters = []
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())

    def update_layer(
        self,
        adapter_name: str,
        ranks: tuple[int, ...],
        alpha: float,
        config: RodeConfig,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        """Adds an adapter, or starts it anew."""
        base = self.get_base_layer()
        device, base_dtype = self._get_base_layer_device_and_dtype(base)
        like = {
            "device": device,
            "dtype": torch.float64 if base_dtype == torch.float64 else torch.float32,
        }
        experts, total = len(ranks), sum(ranks)
        self.rode_ranks[adapter_name] = ranks
        self.rode_scaling[adapter_name] = config.expert_scaling(ranks, alpha)
        self.rode_dropout[adapter_name] = config.dropout
        self.rode_gate[adapter_name] = config.gate
        self.rode_A[adapter_name] = nn.Parameter(torch.empty(total, self.in_features, **like))
        self.rode_B[adapter_name] = nn.Parameter(torch.empty(self.out_features, total, **like))
        if config.gate != "none":
            self.rode_router[adapter_name] = nn.Parameter(torch.empty(experts, self.in_features, **like))
            if config.router_bias:
                self.rode_router_bias[adapter_name] = nn.Parameter(torch.empty(experts, **like))
        self.reset_parameters(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

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

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`sum_i scaling_i B_i A_i` (out_features, in_features), in the parameters' dtype; for constant gates only."""
        ranks = torch.tensor(self.rode_ranks[adapter], device=self.rode_A[adapter].device)
        scaling = self.rode_B[adapter].new_tensor(self.rode_scaling[adapter])
        return (self.rode_B[adapter] * scaling.repeat_interleave(ranks)) @ self.rode_A[adapter]

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raises ValueError for adapters whose gates depend on the input, before any weight is touched."""
        routed = [name for name in adapter_names if self.rode_gate.get(name, "none") != "none"]
        if routed:
            gates = ", ".join(sorted({self.rode_gate[name] for name in routed}))
            raise ValueError(
                f"adapter {', '.join(map(repr, routed))}: its {gates} gates depend on the input, so it is no single weight and "
                "cannot be merged; keep it as an adapter, or train with gate='none'"
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
        **kwargs: Any,
    ) -> None:
        super().__init__()
        RodeLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, ranks, alpha, config, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x (..., in_features) to (..., out_features) in the base layer's output dtype."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
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
        options = {
            "ranks": self.rode_ranks[adapter],
            "scaling": self.rode_scaling[adapter],
            "dropout_p": self.rode_dropout[adapter] if self.training else 0.0,
            "base": result if same else None,
            "inplace": same and self._owns(result),
        }
        A, B = (_parameter(p[adapter], inputs) for p in (self.rode_A, self.rode_B))
        gate = self.rode_gate[adapter]
        if gate == "none":
            y = gated_mixture(inputs, A, B, A.new_ones(len(options["ranks"])), **options)
        else:
            router = self.rode_router[adapter]
            bias = self.rode_router_bias.get(adapter)
            if gate == "relu":
                router = _parameter(router, inputs)
                bias = None if bias is None else _parameter(bias, inputs)
                y, gates = rectified_mixture(inputs, A, B, router, bias, return_gates=True, **options)
            else:
                gates = COMPUTED_GATES[gate](router_logits(x, router, bias))
                y = gated_mixture(inputs, A, B, gates, **options)
            if self.gate_recorder is not None:
                self.gate_recorder.record(adapter, options["ranks"], gates.detach())
        return y if same else result + y.to(result.dtype)

    def _owns(self, result: Tensor) -> bool:
        """Whether nobody else can hold the base layer's output: nn.Linear keeps none, a hook or another class might."""
        base = self.base_layer
        if type(base) is not nn.Linear or base._forward_hooks:
            return False
        # With a bias and three dimensions F.linear returns a view, which autograd lets no such function write to; compiled code
        # is functional anyway.
        return not torch.compiler.is_compiling() and not result._is_view()

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
        return self.rode_gate.get(adapter_name) == "none"

    def __repr__(self) -> str:
        return "rode." + super().__repr__()

    def extra_repr(self) -> str:
        experts = ", ".join(
            f"{name}={self.rode_gate[name]}{list(ranks)}" for name, ranks in self.rode_ranks.items()
        )
        return ", ".join(text for text in (experts, quantization_extra_repr(self)) if text)


def _autocast(x: Tensor) -> Tensor:
    """x as F.linear would see it."""
    device = x.device.type
    if x.dtype == torch.float64 or x.is_meta or not torch.is_autocast_enabled(device):
        return x
    return x.to(torch.get_autocast_dtype(device))


def _parameter(p: Tensor, x: Tensor) -> Tensor:
    """p in a dtype that the operation takes beside x: x's own, or float32 with 16-bit x."""
    if p.dtype == x.dtype or (p.dtype == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
        return p
    return p.to(x.dtype)
