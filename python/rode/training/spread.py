"""Bytes of one device by kind, where a run is spread over several."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from rode.training.accelerators import GIB
from rode.training.meta_step import (
    ADAPTER,
    BASE,
    ELSEWHERE,
    FEATURES,
    GRADIENTS,
    INPUTS,
    LAYER,
    LOGITS,
    OPTIMIZER,
    PROJECTOR,
    WEIGHTS,
    WORK,
    StepCount,
)
from rode.vlm.load import base_model

if TYPE_CHECKING:
    from rode.training.config import Experiment
    from rode.vlm.load import Model

BUCKETS, GATHERED = "buckets of data parallelism", "gathered weights"
_KINDS = (
    WEIGHTS, GATHERED, BASE, ADAPTER, PROJECTOR, GRADIENTS, BUCKETS, OPTIMIZER, INPUTS, FEATURES, LAYER, ELSEWHERE, LOGITS, WORK,
)  # fmt: skip
_SAVED_BY_LAYERS, _SAVED_ELSEWHERE = "saved by layers", "embeddings, masks and norms"


@dataclass(frozen=True)
class Spread:
    """What every device holds a part of.

    Attributes:
        devices: their number. words: how, for a reader.
        weights, gradients, optimizer: whether each is divided among the devices.
    """

    devices: int
    words: str
    weights: bool = False
    gradients: bool = False
    optimizer: bool = False


def gib(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 100 else f"{count / 2**20:.2f} MiB"


def spread_of(experiment: Experiment, devices: int | None = None) -> Spread:
    """How the config's run is spread over devices.

    Args:
        devices: in place of `training.devices`.
    """
    training = experiment.training
    count = training.devices if devices is None else devices
    if training.fsdp is not None:
        return Spread(
            count, "FSDP2: weights, gradients and optimizer divided", count > 1, count > 1, count > 1
        )
    if training.deepspeed is not None:
        stage = training.deepspeed.get("zero_optimization", {}).get("stage", 0)
        stage = stage if isinstance(stage, int) else 0
        return Spread(count, f"DeepSpeed ZeRO-{stage}", stage >= 3, stage >= 2, stage >= 1)
    return Spread(count, "data parallel: each device holds all" if count > 1 else "one device")


def memory_of(step: StepCount, spread: Spread, model: Model) -> dict[str, int]:
    """Bytes of one device at a step's peak, by kind; layers in one sum."""
    kinds: Counter[str] = Counter()
    for label, count in step.at_peak.items():
        kinds[LAYER if label.startswith(LAYER) else label] += count
    devices = spread.devices
    if spread.weights:
        kinds[GATHERED] = 2 * _largest_block(model)  # one in use, one fetched ahead
        for kind in (WEIGHTS, BASE, ADAPTER, PROJECTOR):
            kinds[kind] = -(-kinds[kind] // devices)
    if spread.gradients:
        kinds[GRADIENTS] = -(-kinds[GRADIENTS] // devices)
    elif devices > 1:
        kinds[BUCKETS] = kinds[BASE] + kinds[ADAPTER] + kinds[PROJECTOR]
    if spread.optimizer:
        kinds[OPTIMIZER] = -(-kinds[OPTIMIZER] // devices)
    names = {LAYER: _SAVED_BY_LAYERS, ELSEWHERE: _SAVED_ELSEWHERE}
    return {names.get(kind, kind): kinds[kind] for kind in _KINDS if kinds[kind] > 0}


def _largest_block(model: Model) -> int:
    lists = [m for m in base_model(model).modules() if isinstance(m, nn.ModuleList)]
    sizes = [sum(p.numel() * p.element_size() for p in block.parameters()) for one in lists for block in one]
    return max(sizes, default=0)


def saved_of(step: StepCount) -> dict[str, int]:
    """Bytes held for the backward pass, by layer, and by what is no layer."""
    names = {ELSEWHERE: _SAVED_ELSEWHERE}
    kept = {k: v for k, v in step.saved.items() if k.startswith(LAYER) or k in (ELSEWHERE, LOGITS, FEATURES)}
    return {names.get(k, k): v for k, v in kept.items() if v}
