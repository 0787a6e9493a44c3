"""A small LLaVA with one RoDE adapter, and configurations whose gates need more than the layer's own input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from rode.tuner import RodeConfig, RodeLayer

COMMON = {"ranks": (2, 3), "dropout": 0.0, "init_weights": False, "task_type": "CAUSAL_LM"}
TASK = {"gate": "softmax", "router_input": "task", "num_ids": 3}
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
BLOCK = {
    "gate": "topk",
    "top_k": 2,
    "normalize": True,
    "router_per": "block",
    "expert_per": "block",
    "target_modules": FEED_FORWARD,
}


def adapted(tiny_llava: Callable[[], nn.Module], **fields: Any) -> PeftModel:
    """The model that `tiny_llava` builds with an adapter of `COMMON` and `fields`, in eval mode; tables are random."""
    torch.manual_seed(4)
    model = get_peft_model(tiny_llava(), RodeConfig(**{**COMMON, **fields}))
    for name, p in model.named_parameters():
        if name.endswith(".table"):
            torch.nn.init.normal_(p)
    return model.eval()


def layers_of(model: nn.Module) -> list[RodeLayer]:
    return [m for m in model.modules() if isinstance(m, RodeLayer)]
