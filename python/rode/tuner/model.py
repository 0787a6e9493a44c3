"""`RodeModel`: puts the layers into a model, under PEFT's conventions."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _ExcludedModule,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND, get_quantization_kwargs, resolve_quantization_backend
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rode.finite import refuse_not_finite
from rode.tuner.block_experts import BlockPass
from rode.tuner.config import RodeConfig
from rode.tuner.context import SIDE_INPUTS, ForwardContext, context_of, given_inputs
from rode.tuner.decoding import decoding
from rode.tuner.fingerprint import check_base, check_tensors, weights_of_base
from rode.tuner.layer import Linear, RodeLayer
from rode.tuner.rounding import rounded_parameters
from rode.tuner.siblings import note_siblings
from rode.tuner.targets import (
    DEFAULT_NAMES,
    default_targets,
    named_towers,
    near_misses,
    reads_other_tokens,
    towers,
    under,
)

if TYPE_CHECKING:
    from transformers.utils import ModelOutput

_PATTERNS = ("rank_pattern", "alpha_pattern")
_OF_PEFT = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
_TARGETS = {"llama": list(DEFAULT_NAMES)}

_ALIGNMENT = 64  # bytes, as torch allocates
_FORMER_NAMES = {
    "rode_A": "A",
    "rode_B": "B",
    "rode_router": "router_weight",
    "rode_router_bias": "router_bias",
    "rode_table": "table",
    "rode_threshold": "threshold_weight",
    "rode_threshold_bias": "threshold_bias",
    "rode_norm": "norm_weight",
    "rode_norm_bias": "norm_bias",
}


class RodeModel(BaseTuner):
    """A model whose linear layers carry mixtures of LoRA experts of different ranks (RoDE, arXiv 2407.12730).

    Usually made by `get_peft_model`; `import rode` (or `rode.tuner`) registers the method with PEFT first.

    Args:
        model: the model to adapt; frozen, and changed in place.
        config: a [`RodeConfig`].
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, for loading into.

    Example:
        ```py
        >>> from peft import get_peft_model
        >>> from rode import RodeConfig

        >>> model = get_peft_model(model, RodeConfig(ranks=(2, 4, 8, 16)))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix: str = "rode_"
    tuner_layer_cls = RodeLayer
    target_module_mapping = _TARGETS

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Injects as PEFT does; no match at all is a ValueError that lists near misses."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            raise NoMatchingPeftModuleError(self._no_match(model, adapter_name, str(error))) from None
        config = _own(self.peft_config[adapter_name])
        config.base = weights_of_base(model, adapter_name)
        if config.needs_forward_hooks:
            self._context.attach(self.model, needed=True)
        # Bare names match a tower as a matter of course; of a regex it may not be what was meant.
        if isinstance(config.target_modules, str) and (held := self._held_back(model, config)):
            warnings.warn(
                f"target_modules matches {len(held)} modules of the vision tower or projector, such as {held[0]}; they are "
                "left alone. To adapt them too, name the tower in target_modules; to silence this, let the regex name the "
                "language model.",
                stacklevel=2,
            )

    def _no_match(self, model: nn.Module, adapter_name: str, reason: str) -> str:
        config = _own(self.peft_config[adapter_name])
        targets = config.target_modules
        assert targets is not None, "set before the model is searched"
        text = f"{reason} RodeConfig.target_modules={targets!r} matches no layer that may be adapted."
        if held := self._held_back(model, config):
            text += (
                f" {len(held)} matches lie in the vision tower or projector, such as {held[0]}: those are adapted only where "
                "target_modules names the tower."
            )
        misses = near_misses(model, targets, closed=self._closed)
        return f"{text} Near misses: {'; '.join(misses) or 'none, the model has no linear layer'}."

    def _held_back(self, model: nn.Module, config: RodeConfig) -> list[str]:
        return [
            name
            for name, _ in model.named_modules()
            if under(name, self._closed)
            and (found := check_target_module_exists(config, name))
            and not isinstance(found, _ExcludedModule)
        ]

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = _own(peft_config)
        if config.target_modules is None:
            config.target_modules = default_targets(self.model, config)
        return config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Settles which towers are closed to this adapter, before PEFT asks about the first module."""
        config = _own(peft_config)
        targets = config.target_modules
        assert targets is not None, "set by _prepare_adapter_config"
        self._context = context_of(model) or ForwardContext()
        self._roots = roots = towers(model)
        opened = named_towers(targets, roots)
        self._closed = tuple(root for root in roots if root not in opened)
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            # PEFT's list of every linear layer, less the towers': what is saved then says what was adapted.
            names = _own(_maybe_include_all_linear_layers(config, model)).target_modules or ()
            config.target_modules = {name for name in names if not under(name, self._closed)}

    def _check_target_module_exists(  # type: ignore[override]  # PEFT's is static, and called on the tuner
        self, peft_config: PeftConfig, key: str
    ) -> bool | re.Match[str] | None:
        found = check_target_module_exists(peft_config, key)
        excluded = isinstance(found, _ExcludedModule)
        return False if found and not excluded and under(key, self._closed) else found

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = _own(peft_config)
        ranks = config.rank_pattern.get(get_pattern_key(list(config.rank_pattern), current_key), config.ranks)
        alpha = config.alpha_pattern.get(
            get_pattern_key(list(config.alpha_pattern), current_key), config.alpha
        )
        siblings: list[RodeLayer] = [
            m for m in parent.children() if isinstance(m, RodeLayer) and m is not target
        ]
        shares = self._shares_gates(config, adapter_name, siblings, ranks, current_key)
        layer: RodeLayer
        if isinstance(target, RodeLayer):
            layer = target
            layer.update_layer(
                adapter_name, ranks, alpha, config, inference_mode=config.inference_mode, shares_gates=shares
            )
        else:
            _check_supported(target, current_key)
            layer = Linear(
                target, adapter_name, ranks, alpha, config, shares, **get_quantization_kwargs(self)
            )
            self._replace_module(parent, target_name, layer, target)
        layer.info.module_name, layer.info.block = current_key, current_key.rpartition(".")[0]
        layer.info.in_tower = under(current_key, self._roots) is not None
        layer.info.of_cross_attention = reads_other_tokens(current_key)
        layer.info.context = self._context
        note_siblings([m for m in (*siblings, layer) if isinstance(m, Linear)])
        if config.expert_per == "block" and config.needs_router(len(ranks)):
            self._run_block_by_expert(layer, siblings, parent)

    def _shares_gates(
        self,
        config: RodeConfig,
        adapter_name: str,
        siblings: list[RodeLayer],
        ranks: tuple[int, ...],
        name: str,
    ) -> bool:
        """Whether an earlier layer of the block computes this one's gates."""
        if config.router_per != "block" or not config.needs_router(len(ranks)):
            return False
        others = (m.adapter(adapter_name) for m in siblings if adapter_name in m.rode_adapters)
        first = next((a for a in others if not a.shares_gates and config.needs_router(len(a.ranks))), None)
        if first is not None and len(first.ranks) != len(ranks):
            raise ValueError(
                f"{name}: router_per='block' shares the gates of {first.info.module_name}, which has {len(first.ranks)} experts, "
                f"but rank_pattern gives {len(ranks)}; give them as many"
            )
        return first is not None

    def _run_block_by_expert(self, layer: RodeLayer, siblings: list[RodeLayer], parent: nn.Module) -> None:
        inside = [layer.info.block, *(name for name, _ in parent.named_modules())]
        takes = inspect.signature(parent.forward).parameters
        if "attention_mask" in takes or any("attn" in n.lower() or "attention" in n.lower() for n in inside):
            raise ValueError(
                f"{layer.info.module_name}: expert_per='block' runs a feed-forward block once for each expert, and the module "
                "around this layer is or holds attention; leave it out of target_modules, or give it one expert by rank_pattern"
            )
        shared = next((m.info.block_pass for m in (layer, *siblings) if m.info.block_pass is not None), None)
        if shared is None:
            shared = BlockPass(layer.info.block)
            self._context.handles += shared.attach(parent)
        layer.info.block_pass = shared

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """Replaces as PEFT does. A base layer that is put back keeps what it has: PEFT would assign its weight to it."""
        if isinstance(child, RodeLayer) and new_module is child.get_base_layer():
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def generate(self, *args: Any, **kwargs: Any) -> Tensor | ModelOutput:
        """Generates as the model does; takes `rode_task_ids` and `rode_cluster_ids` (batch,) beside it."""
        layers = [m for m in self.model.modules() if isinstance(m, RodeLayer) and not m.disable_adapters]
        active = [m.adapter(name) for m in layers for name in m.active_adapters if name in m.rode_adapters]
        if any(adapter.config.gate == "expert-choice" for adapter in active):
            raise ValueError(
                "gate='expert-choice': experts choose among all tokens of a sequence, those to come included, so it cannot "
                "generate; it is a control for training and scoring"
            )
        inputs = {name: kwargs.pop(name) for name in SIDE_INPUTS if name in kwargs}
        prompt = next(
            (
                kwargs[name]
                for name in ("input_ids", "inputs_embeds", "inputs")
                if kwargs.get(name) is not None
            ),
            args[0] if args else None,
        )
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2:
            self._context.generating = mask.bool()
        elif prompt is not None:
            self._context.generating = torch.ones(prompt.shape[:2], dtype=torch.bool, device=prompt.device)
        try:
            remembering = decoding(layer for layer in layers if isinstance(layer, Linear))
            with given_inputs(self._context, inputs), rounded_parameters(active), remembering:
                return self.model.generate(*args, **kwargs)
        finally:
            self._context.generating = None

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Adapters are float32 from the start; `autocast_adapter_dtype=False` asks for the base layer's dtype instead."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for module in self.model.modules():
                if isinstance(module, RodeLayer):
                    module.round_adapter(adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Renames as PEFT does; missing and surplus tensors, and values that are not finite, are a ValueError, where PEFT's other
        methods warn."""
        refuse_not_finite(state_dict, f"adapter {adapter_name!r}")
        own_config = _own(config)
        if (
            saved := own_config.belongs_to
        ) is not None:  # these tensors are the first ones that are loaded with it
            own_config.belongs_to = None
            check_tensors(saved, state_dict, adapter_name)
            check_base(saved, model, adapter_name)
        state_dict = {_renamed(name): _aligned(tensor) for name, tensor in state_dict.items()}
        remapped = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        own = model.state_dict()
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
        wanted = set(_filter_state_dict_by_key_prefixes(own, prefixes))
        missing = sorted(wanted - set(remapped))
        surplus = sorted(
            k for k in remapped if k not in own and k.removeprefix("base_model.model.") not in own
        )
        if missing or surplus:
            missing = [
                cls._remove_adapter_name_from_key(name, adapter_name) for name in missing
            ]  # as a file has them
            parts = [
                f"{len(names)} {what}, such as {names[0]}"
                for names, what in ((missing, "missing"), (surplus, "surplus"))
                if names
            ]
            raise ValueError(
                f"adapter {adapter_name!r}: the file's tensors are not those of its configuration on this model "
                f"({'; '.join(parts)}): the file is damaged, adapter_config.json was edited, or the adapter belongs to another "
                "model; none of them was loaded"
            )
        return remapped

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges as PEFT does, for adapters with constant gates; refuses the others before any layer is changed."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]  # PEFT's returns the model, and says None
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names)
        super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )
        self._context.detach()
        return self.model

    def _check_mergeable(self, adapter_names: list[str] | None) -> None:
        for module in self.model.modules():
            if isinstance(module, RodeLayer):
                module.check_mergeable(module.active_adapters if adapter_names is None else adapter_names)

    @torch.no_grad()
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Adds the adapter whose output is `sum_a weights_a * output_a`: all experts side by side, the weights in their scaling.

        This is exact, and possible where one expert's gate does not depend on the others: gate "relu" or "none".

        Args:
            adapters: names of adapters that agree in gate, dropout and targets and have no patterns or modules_to_save.
            weights: one finite factor per adapter. adapter_name: of the new adapter, which is not activated.
            combination_type: "cat", PEFT's name for side by side.

        Raises:
            ValueError: naming what is unknown, or what the adapters do not agree in.
        """
        if combination_type != "cat":
            raise ValueError(
                f"combination_type: expected 'cat', got {combination_type!r}; a routed mixture is no one matrix that could be "
                "averaged or decomposed (for plain LoRA experts rode.baselines.lorahub.compose_adapters adds up A and B)"
            )
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"weights: expected one per adapter, got {len(weights)} for {len(adapters)}")
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"adapters: {unknown} not in the model, which has {sorted(self.peft_config)}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name: {adapter_name!r} is in the model already")
        configs = [_own(self.peft_config[name]) for name in adapters]
        first = configs[0]
        own = {"ranks", "alpha", "scaling", "router_bias", "router_init", "init_weights", "modules_to_save"}
        shared = [f.name for f in fields(first) if f.name not in own and f.name not in _PATTERNS + _OF_PEFT]
        for field in shared:
            if any(getattr(config, field) != getattr(first, field) for config in configs):
                raise ValueError(f"adapters {list(adapters)} differ in {field}; they cannot become one")
        together = [
            name for name in ("shared_A", "universal_expert", "norm_experts") if getattr(first, name)
        ] + (["combine='factors'"] if first.combine == "factors" else [])
        if first.gate not in ("relu", "sigmoid", "none") or first.normalize or together:
            what = together[0] if together else f"gate={first.gate!r}"
            raise ValueError(
                f"{what}: the experts of one adapter depend on each other; keep the adapters apart"
            )
        if first.id_input or first.router_input == "constant" or first.router_per == "block":
            raise ValueError(
                f"router_input={first.router_input!r}, router_per={first.router_per!r}: only routers that read their own layer's "
                "input can stand side by side; keep the adapters apart"
            )
        for field in (*_PATTERNS, "modules_to_save"):
            if any(getattr(config, field) for config in configs):
                raise ValueError(f"adapters {list(adapters)}: {field} cannot be carried over to one adapter")
        scaling = [
            weight * factor
            for config, weight in zip(configs, weights, strict=True)
            for factor in config.expert_scaling(config.ranks, config.alpha)
        ]
        router_bias = any(config.router_bias for config in configs)
        self.peft_config[adapter_name] = replace(
            first,
            ranks=tuple(rank for config in configs for rank in config.ranks),
            scaling=tuple(scaling),
            router_bias=router_bias,
            router_init="kaiming",
        )
        self.inject_adapter(self.model, adapter_name)
        for layer in self.model.modules():
            if isinstance(layer, RodeLayer) and adapter_name in layer.rode_adapters:
                layer.concatenate(adapters, adapter_name)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names: RoDE runs one set of adapters for the whole batch; call set_adapter and split the batch"
            )
        return nullcontext()


def _renamed(name: str) -> str:
    """A saved tensor's name of today; files of before December 2026 have no module for each adapter."""
    layer, _, last = name.rpartition(".")
    return f"{layer}.rode_adapters.{_FORMER_NAMES[last]}" if last in _FORMER_NAMES else name


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where it lies askew in a mapped file: products of unaligned memory may differ in their last bit."""
    askew = tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT != 0
    return tensor.clone() if askew else tensor


def _own(config: PeftConfig) -> RodeConfig:
    """The configuration as what it is: PEFT gives this tuner no other kind."""
    assert isinstance(config, RodeConfig), f"expected a RodeConfig, got {type(config).__name__}"
    return config


def _check_supported(target: nn.Module, name: str) -> None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            f"{name}: nn.MultiheadAttention reads this layer's weight and never calls it, so an adapter would do nothing; "
            "exclude it by exclude_modules"
        )
    if isinstance(base, Conv1D):
        return
    if callable(getattr(base, "weight", None)):
        raise TypeError(
            f"{name}: {type(base).__name__} is torch's dynamic quantisation, which passes no gradient to what comes before it; "
            "train on the unquantised model or on one quantised by bitsandbytes, torchao or HQQ"
        )
    backend = resolve_quantization_backend(base) if not isinstance(base, nn.Linear) else None
    sizes = (getattr(base, "in_features", None), getattr(base, "out_features", None))
    if (backend is None or backend.layer_type != "linear") and not all(isinstance(n, int) for n in sizes):
        raise TypeError(
            f"{name}: expected a linear layer (nn.Linear, Conv1D, a quantised one, or any with in_features and out_features), "
            f"got {type(base).__name__}; leave it out by exclude_modules"
        )
