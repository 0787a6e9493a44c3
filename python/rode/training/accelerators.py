"""GPUs by name: memory and peak of dense products, as their makers' data sheets say."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rode_food.settings import did_you_mean

GIB = 2**30


@dataclass(frozen=True)
class Accelerator:
    """A device to plan for.

    Attributes:
        name: as given. memory: bytes. flops: bfloat16 operations per second of dense products that add up in float32, at most; None
            where only the memory was given. source: where both numbers are from.
    """

    name: str
    memory: int
    flops: float | None = None
    source: str = ""


# name: GiB, TFLOPS of bfloat16 without sparsity, source
_KNOWN = {
    "RTX3090": (24, 71.0, "NVIDIA Ampere GA102 GPU Architecture whitepaper"),
    "RTX4090": (24, 165.2, "NVIDIA Ada GPU Architecture whitepaper"),
    "A10": (24, 125.0, "NVIDIA A10 data sheet"),
    "L4": (24, 121.0, "NVIDIA L4 data sheet, half of the figure with sparsity"),
    "L40S": (48, 362.0, "NVIDIA L40S data sheet"),
    "A100-40GB": (40, 312.0, "NVIDIA A100 data sheet"),
    "A100": (80, 312.0, "NVIDIA A100 data sheet"),
    "H100": (80, 989.0, "NVIDIA H100 data sheet, SXM, half of the figure with sparsity"),
    "H200": (141, 989.0, "NVIDIA H200 data sheet, SXM, half of the figure with sparsity"),
}


def find_accelerator(name: str) -> Accelerator:
    """A device by its name, or by its memory ("24GB", 2**30 bytes each as data sheets mean it).

    Raises:
        ValueError: neither.
    """
    key = re.sub(r"[\s_]", "", name).upper()
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)(?:GB|GIB|G)", key):
        memory = int(float(found[1]) * GIB)
        if memory > 0:
            return Accelerator(name, memory)
    key = key.removeprefix("NVIDIA").removeprefix("GEFORCE")
    if key not in _KNOWN:
        raise ValueError(
            f"--device: expected a memory such as 24GB or one of {', '.join(_KNOWN)}, got {name!r}; {did_you_mean(key, _KNOWN)}"
        )
    memory, tflops, source = _KNOWN[key]
    return Accelerator(key, memory * GIB, tflops * 1e12, source)
