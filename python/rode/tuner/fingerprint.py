"""What a saved adapter says of itself: a few of the base model's weights, a checksum of its configuration, one of its tensors.

It stands in adapter_config.json as `belongs_to`, and is compared when the adapter is loaded. An adapter fits any base model of the
same sizes, and an edited configuration fits the same tensors; both give other answers without an error.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_LAYERS, _VALUES = 8, 16  # of the adapted layers, and of each one's weight
_TOLERANCE, _SMALLEST = 2.0**-7, 2.0**-16
"""Of a value, and of the largest one: a weight that was rounded to bfloat16 or float16 on the way is the same weight."""
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Formats of weights; one of 8 bits means nothing without its scale."""
_NOT_HASHED = {
    "belongs_to",
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "inference_mode",
    "auto_mapping",
}
"""Fields that say nothing of how the tensors are used."""


class AdapterMismatch(UserWarning):
    """An adapter is not used as it was saved: on another base model, with another configuration or other tensors."""


def weights_of_base(model: nn.Module, adapter: str) -> dict[str, Any] | None:
    """A few values of the frozen weights of a few layers that have the adapter; None where none can be read (quantised, sharded, on
    no device yet)."""
    whole = getattr(model, "get_base_model", None)  # PEFT's wrapper, which puts a prefix before names
    model = model if whole is None else whole()
    layers = {
        name: cast(Any, m).get_base_layer()
        for name, m in model.named_modules()
        if adapter in getattr(m, "rode_adapters", ())
    }
    readable = {name: weight for name, layer in layers.items() if (weight := _weight(layer)) is not None}
    if not readable:
        return None
    names = sorted(readable)
    chosen = names[:: -(-len(names) // _LAYERS)]
    return {
        "architecture": type(model).__name__,
        "weights": [
            {"shape": list(readable[name].shape), "values": _some(readable[name])} for name in chosen
        ],
        "names": chosen,
    }


def _weight(layer: nn.Module) -> Tensor | None:
    weight = layer._parameters.get("weight")
    if weight is None or type(weight) not in (Tensor, nn.Parameter) or weight.is_meta:
        return None
    readable = weight.dtype in _NUMBERS and weight.dim() == 2 and weight.numel() > 0
    return weight.detach() if readable else None


def _some(weight: Tensor) -> list[float]:
    rows, columns = weight.shape
    at = torch.arange(_VALUES, device=weight.device)
    picked = weight[at * 7919 % rows, at * 104729 % columns]  # primes: of all rows and columns
    return [float(f"{value:.6g}") for value in picked.double().tolist()]


def config_checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of the fields of adapter_config.json that say how the tensors are used."""
    kept = {name: value for name, value in values.items() if name not in _NOT_HASHED}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def tensors_checksum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the experts' and routers' tensors, whatever device they are on.

    Modules that are trained whole (`modules_to_save`) are left out: PEFT renames theirs while it loads.
    """
    digest = hashlib.sha256()
    for name in sorted(name for name in tensors if "rode_" in name):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_config(values: Mapping[str, Any], where: object) -> None:
    """Warns with AdapterMismatch if a configuration is not as it was saved; one without a checksum is taken as it is."""
    saved = values.get("belongs_to")
    if isinstance(saved, dict) and saved.get("config") not in (None, config_checksum(values)):
        _warn(
            f"{where}: the configuration was edited after the adapter was saved, and its tensors mean something else now"
        )


def check_tensors(saved: Mapping[str, Any], tensors: Mapping[str, Tensor], adapter: str) -> None:
    """Warns with AdapterMismatch if tensors are not those that were saved with their configuration."""
    if saved.get("tensors") not in (None, tensors_checksum(tensors)):
        _warn(
            f"adapter {adapter!r}: its tensors are not those that were saved with its configuration; the file was changed, or is "
            "damaged"
        )


def check_base(saved: Mapping[str, Any], model: nn.Module, adapter: str) -> None:
    """Warns with AdapterMismatch if the model is not the one on which an adapter was saved; weights that cannot be read are passed
    over."""
    then, now = saved.get("base"), weights_of_base(model, adapter)
    if not isinstance(then, dict) or now is None or len(then["weights"]) != len(now["weights"]):
        return
    for name, before, after in zip(now["names"], then["weights"], now["weights"], strict=True):
        if before["shape"] != after["shape"]:
            differs = f"has the shape {after['shape']}, and had {before['shape']}"
        elif (pair := _difference(before["values"], after["values"])) is not None:
            differs = f"holds {pair[1]:g}, where it held {pair[0]:g}"
        else:
            continue
        of = f"a {then['architecture']}" if then["architecture"] != now["architecture"] else "another model"
        _warn(
            f"adapter {adapter!r} was trained on {of}: the frozen weight of {name} {differs}; load it on the model that it was "
            "trained on"
        )
        return


def _difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The first two values that rounding does not explain."""
    largest = max(map(abs, before))
    for b, a in zip(before, after, strict=True):
        if abs(a - b) > _TOLERANCE * abs(b) + _SMALLEST * largest:
            return b, a
    return None


def _warn(text: str) -> None:
    warnings.warn(text, AdapterMismatch, stacklevel=3)
