"""`RodeLayer`: a linear layer with a mixture of LoRA experts for each adapter."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import chain
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rode.tuner.adapter import Adapter
from rode.tuner.config import RodeConfig
from rode.tuner.context import ForwardContext
from rode.tuner.decoding import Decoding
from rode.tuner.gating import LayerInfo
from rode.tuner.ownership import has_hooks, is_plain, may_write_into
from rode.tuner.quantized import is_number_format, quantized_in_place, why_not_mergeable


class RodeLayer(BaseTunerLayer):
    """A frozen layer and its adapters: `rode_adapters`, by name; see `Adapter`."""

    adapter_layer_names = ("rode_adapters",)
    other_param_names = ()

    base_layer: nn.Module
    rode_adapters: nn.ModuleDict
    info: LayerInfo
    in_features: int
    training: bool  # of the module that this is part of
    out_features: int

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.quantized_in_place = quantized_in_place(self.get_base_layer(), kwargs)
        self.quantization_backend = None
        if not self.quantized_in_place:
            self.quantization_backend = resolve_quantization_backend(
                self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
            )
        self.rode_adapters = nn.ModuleDict()
        self.info = LayerInfo()
        self._disable_adapters = False
        self.merged_adapters = []
        in_features, out_features = _get_in_out_features(self.get_base_layer())
        assert in_features is not None, "checked before a layer is replaced"
        assert out_features is not None, "checked before a layer is replaced"
        self.in_features, self.out_features = in_features, out_features

    @property
    def context(self) -> ForwardContext:
        """The state of the model's forward pass."""
        return self.info.context

    def adapter(self, name: str) -> Adapter:
        """The adapter of this name. Raises KeyError where the layer has none."""
        return cast(
            Adapter, self.rode_adapters[name]
        )  # or a wrapper that passes attributes on, such as FSDP's

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """To where the base layer is; float64 if that is. PEFT's also rounds to other dtypes, and makes frozen ones trainable."""
        of_base, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        for parameter in self.adapter(adapter_name).parameters():
            if not parameter.is_meta:
                dtype = torch.float64 if base_dtype == torch.float64 else parameter.dtype
                parameter.data = parameter.data.to(device or of_base or parameter.device, dtype)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Those that PEFT finds; the device of any parameter or buffer if the layer has no weight by a usual name (HQQ)."""
        device, dtype = super()._get_base_layer_device_and_dtype(base_layer)
        if device is None:
            held = next(chain(base_layer.parameters(), base_layer.buffers()), None)
            device = None if held is None else held.device
        return device, dtype

    def round_adapter(self, adapter_name: str) -> None:
        """Adapters in the base layer's dtype, if that is a floating-point one."""
        dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())[1]
        for parameter in self.adapter(adapter_name).parameters():
            if is_number_format(dtype) and not parameter.is_meta:
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
        device, base_dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        added = Adapter(
            adapter_name,
            self.in_features,
            self.out_features,
            ranks,
            alpha,
            config,
            self.info,
            shares_gates=shares_gates,
            device=device,
            dtype=torch.float64 if base_dtype == torch.float64 else torch.float32,
        )
        self.rode_adapters[adapter_name] = added.train(self.training)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def concatenate(self, adapters: Sequence[str], into: str) -> None:
        """Fills the adapter `into` with the experts of `adapters`, side by side."""
        self.adapter(into).concatenate([self.adapter(name) for name in adapters])

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The one matrix (out_features, in_features) that an adapter with constant gates adds, in the parameters' dtype."""
        return self.adapter(adapter).delta_weight()

    def check_mergeable(self, adapter_names: list[str]) -> None:
        """Raises ValueError, before any weight is touched, for adapters whose gates depend on the input, and for base layers in
        which no merged weight can be stored."""
        configs = {name: self.adapter(name).config for name in adapter_names if name in self.rode_adapters}
        routed = [name for name, config in configs.items() if not config.constant_gates]
        if routed:
            gates = ", ".join(sorted({configs[name].gate for name in routed}))
            raise ValueError(
                f"adapter {', '.join(map(repr, routed))}: its {gates} gates depend on the input, so it is no single weight and "
                "cannot be merged; keep it as an adapter, or train with gate='none' or router_input='constant'"
            )
        reason = why_not_mergeable(self.get_base_layer(), self.quantization_backend, self.quantized_in_place)
        if configs and reason:
            raise ValueError(f"{self.info.module_name}: {reason}")

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Stores the weight as PEFT does. Where that makes a new layer (HQQ), the new one gets the bias too."""
        before = self.get_base_layer()
        super().set_base_weight(weight_data)
        after = self.get_base_layer()
        if after is not before and getattr(after, "bias", None) is None:
            after.bias = before.bias


def _is_one_product(adapter: nn.Module, base_layer: nn.Module, x: Tensor) -> bool:
    """Whether the adapter can make the frozen layer's output itself, as the layer would."""
    # a wrapped adapter, or one that is sharded by itself, is of another class
    if type(adapter) is not Adapter or not adapter.makes_product() or not is_plain(base_layer):
        return False
    weight = cast(Tensor, base_layer._parameters["weight"])
    return weight.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)


class Linear(nn.Module, RodeLayer):
    """A linear layer, quantised or not, that adds the active adapters' mixtures to its output."""

    decoding: Decoding | None = None  # while the model generates

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
        decoding = self.decoding
        if decoding is not None and not args and not kwargs and (y := decoding.run(x)) is not None:
            return y
        if self._disable_adapters and self.merged_adapters:
            self.unmerge()
        # Dictionaries: to go through properties and `nn.Module.__getattr__` takes as long as the work on one token.
        modules = self._modules
        base_layer = cast(nn.Module, modules["base_layer"])
        adapters = cast(nn.ModuleDict, modules["rode_adapters"])._modules
        off = self._disable_adapters or self.merged_adapters
        active = [] if off else [adapters[name] for name in self.active_adapters if name in adapters]
        block = self.info.block_pass
        siblings = self.info.siblings
        if active and not args and not kwargs and block is None and _is_one_product(active[0], base_layer, x):
            first = cast(Adapter, active.pop(0))
            result = None if siblings is None or active else siblings.run(self, first, x)
            if result is None:
                result = first.forward(x, None, linear=cast(nn.Linear, base_layer))
                if siblings is not None:
                    siblings.ran_apart(self, result)
                if decoding is not None and not active:
                    decoding.learn(x)
        elif block is None:
            if active and siblings is not None and not torch.compiler.is_compiling():
                siblings.left(self)
            result = base_layer(x, *args, **kwargs)
        else:
            result = block.base(self.info.module_name, base_layer, x, args, kwargs)
        if active and self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in active:
            owned = block is None and may_write_into(result, base_layer) and not has_hooks(adapter)
            result = adapter(x, result, owned)
        return result

    def only_adapter(self, x: Tensor) -> Adapter | None:
        """The adapter that makes the layer's whole output of x; None where another is active too, or something stands between."""
        if (
            self._disable_adapters
            or self.merged_adapters
            or self.info.block_pass is not None
            or has_hooks(self)
        ):
            return None
        active = [name for name in self.active_adapters if name in self.rode_adapters]
        if len(active) != 1 or not _is_one_product(self.rode_adapters[active[0]], self.base_layer, x):
            return None
        return self.adapter(active[0])

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
            if adapter not in self.rode_adapters:
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
        if isinstance(self.get_base_layer(), Conv1D):  # GPT-2's, which holds its weight transposed
            delta = delta.T
        return (weight.to(delta.dtype) + sign * delta).to(weight.dtype)  # rounded once

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Only constant gates are one matrix."""
        return adapter_name in self.rode_adapters and self.adapter(adapter_name).config.constant_gates

    def __repr__(self) -> str:
        return "rode." + super().__repr__()

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)
