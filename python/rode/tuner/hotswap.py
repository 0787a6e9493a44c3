"""Replacing an adapter's weights by those of another file, in place: compiled code and optimizers keep their tensors."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from torch import nn

from rode.tuner.config import RodeConfig
from rode.tuner.layer import RodeLayer
from rode.tuner.model import RodeModel

# Fields that do not change what the weights compute: how they were made, and where they came from.
_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "belongs_to",
    "inference_mode",
    "init_weights",
    "peft_version",
    "revision",
    "router_init",
    "task_type",
}


def hotswap_adapter(
    model: PeftModel | nn.Module, path: str | os.PathLike[str], adapter_name: str = "default", **kwargs: Any
) -> None:
    """Gives an adapter the weights of the one saved in `path`, for adapters of equal configuration.

    PEFT's `peft.utils.hotswap.hotswap_adapter` serves LoRA only.

    Args:
        model: a PeftModel with the adapter, compiled or not.
        path: folder of an adapter, or its name on the hub. kwargs: for the hub: revision, subfolder, token, ...

    Raises:
        ValueError: the model has no such adapter, it is merged, or configurations or tensors differ; nothing is changed then.
    """
    inner = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PeftModel):
        raise ValueError(f"model: expected a PeftModel, got {type(inner).__name__}")
    own = inner.peft_config.get(adapter_name)
    if not isinstance(own, RodeConfig):
        raise ValueError(
            f"adapter_name: expected a RoDE adapter of the model, got {adapter_name!r}; it has {sorted(inner.peft_config)}"
        )
    if any(adapter_name in m.merged_adapters for m in inner.modules() if isinstance(m, RodeLayer)):
        raise ValueError(
            f"adapter {adapter_name!r} is merged into the base weights; call unmerge_adapter() first"
        )
    if own.modules_to_save:
        raise ValueError(
            f"modules_to_save={own.modules_to_save}: whole modules are not swapped in place; load the adapter under another name"
        )
    other = PeftConfig.from_pretrained(str(path), **kwargs)
    _check_equal(own, other, str(path))
    state = load_peft_weights(str(path), device="cpu", **kwargs)
    config = cast(RodeConfig, other)
    state = RodeModel._remap_adapter_state_dict_for_load(inner, config, adapter_name, state)
    held = inner.state_dict(keep_vars=True)
    for name, tensor in state.items():
        if held[name].shape != tensor.shape:
            raise ValueError(
                f"{path}: {name}: expected shape {tuple(held[name].shape)}, got {tuple(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            held[name].copy_(tensor)


def _check_equal(own: RodeConfig, other: PeftConfig, path: str) -> None:
    if not isinstance(other, RodeConfig):
        raise ValueError(f"{path}: expected a RoDE adapter, got one of type {other.peft_type}")
    for field in fields(own):
        mine, theirs = getattr(own, field.name), getattr(other, field.name)
        if field.name == "target_modules" and not isinstance(mine, str) and not isinstance(theirs, str):
            mine, theirs = set(mine or ()), set(theirs or ())
        if field.name not in _FREE and mine != theirs:
            raise ValueError(
                f"{path}: {field.name}={theirs!r}, but the model's adapter has {mine!r}; adapters of different configuration "
                "cannot be swapped in place: load it under another name"
            )
