"""RoDE as a PEFT method. Importing this package registers it, under the name "RODE"."""

from __future__ import annotations

import peft.mapping

from rode.tuner.callbacks import HoldSparsity
from rode.tuner.config import RodeConfig
from rode.tuner.context import routing_inputs
from rode.tuner.hotswap import hotswap_adapter
from rode.tuner.layer import Linear, RodeLayer
from rode.tuner.model import RodeModel
from rode.tuner.peft_type import RODE
from rode.tuner.statistics import ExampleGates, GateReport, GateStatistics, LayerGates


def register() -> None:
    """Makes `get_peft_model`, `PeftModel.from_pretrained` and transformers' `load_adapter` know the method; may be repeated.

    PEFT's own `register_peft_method` refuses names outside its enum, so this fills the tables that it would fill.
    """
    peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[RODE] = RodeConfig
    peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[RODE] = RodeModel
    peft.mapping.PEFT_TYPE_TO_PREFIX_MAPPING[RODE] = RodeModel.prefix


register()

__all__ = [
    "RODE",
    "ExampleGates",
    "GateReport",
    "GateStatistics",
    "HoldSparsity",
    "LayerGates",
    "Linear",
    "RodeConfig",
    "RodeLayer",
    "RodeModel",
    "hotswap_adapter",
    "register",
    "routing_inputs",
]
