"""Base layers whose weight is not a plain matrix: what PEFT knows of them, and whether a merged weight can be stored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.quantization_utils import QuantizationBackend
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def quantized_in_place(base: nn.Module, given: Mapping[str, Any]) -> bool:
    """Whether torchao's `quantize_` was applied directly, so that PEFT does not know how to make the weight, a subclass, anew."""
    return _made_by(base, "torchao") and given.get("get_apply_tensor_subclass") is None


def why_not_mergeable(base: nn.Module, backend: QuantizationBackend | None, in_place: bool) -> str:
    """Why no merged weight can be stored in `base`, and what to do; empty if one can.

    Assigning to the weight of a layer that PEFT does not know may change nothing, or store numbers that lack their scale.

    Args:
        backend: what PEFT knows about this kind of layer. in_place: see `quantized_in_place`.
    """
    if in_place:
        return (
            "torchao's quantize_ was applied to the model itself, so nobody knows how to quantise a merged weight; merge before "
            "quantize_, or load the model with transformers' TorchAoConfig"
        )
    keep = "keep the adapter, or merge it into the model before that"
    kind = type(base).__name__
    if backend is not None:
        takes = backend.supports_merge
        return (
            ""
            if takes
            else f"PEFT stores no merged weight in a layer quantised by {backend.backend_name}; {keep} is quantised"
        )
    if _made_by(base, "optimum.quanto"):
        return f"PEFT stores no merged weight in a layer quantised by optimum-quanto; {keep} is quantised"
    weight = {**base._parameters, **base._buffers}.get("weight")
    if weight is None:
        return f"{kind} holds no weight that could be replaced (it has none, or computes it from others); {keep} is changed so"
    if type(weight) not in _PLAIN:
        return f"the weight of {kind} is a {type(weight).__name__}, which no plain tensor replaces; {keep} is changed so"
    if not is_number_format(weight.dtype):
        return f"the weight of {kind} is stored as {weight.dtype}, with scales that PEFT does not know; {keep} is quantised"
    return ""


def is_number_format(dtype: torch.dtype | None) -> bool:
    """Whether parameters can be kept in this dtype: float64, float32, bfloat16, float16, and not what quantised weights are in."""
    return dtype is not None and dtype.is_floating_point and dtype.itemsize >= 2


def _made_by(base: nn.Module, package: str) -> bool:
    weight = getattr(base, "weight", None)
    return any(cls.__module__.startswith(package + ".") for cls in type(weight).__mro__)
