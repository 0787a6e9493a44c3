"""The systems that the paper compares with or names, each as a `RodeConfig`.

Numbers are the original's published defaults where it has code; `docs/presets.md` says where each comes from, and what is not
carried over. Any field may be given another value: `preset("mocle", num_ids=16)`.
"""

from __future__ import annotations

import difflib
from typing import Any

from rode.tuner.config import RodeConfig

ATTENTION = ["q_proj", "v_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
_PLAIN = r"(q_proj|k_proj|v_proj|o_proj)"

TASKS = 4  # ingredients, recipe, nutrition, category

PRESETS: dict[str, dict[str, Any]] = {
    # arXiv 2407.12730: ranks (2, 4, 8, 16), relu gates
    "rode": {"ranks": (2, 4, 8, 16), "gate": "relu"},
    "lora": {"ranks": (8,), "gate": "none"},
    # arXiv 2312.14991: LoRA of rank 8 on q and v, and with a dense softmax over four of them (RoDE's Eq. 1)
    "foodlmm": {"ranks": (8,), "gate": "none"},
    "foodlmm-moe": {"ranks": (8,) * 4, "gate": "softmax"},
    # arXiv 2401.16160: one router for a feed-forward block, its best expert unscaled; plain LoRA on attention
    "llava-mole": {
        "ranks": (32,) * 3,
        "alpha": 64.0,
        "gate": "topk",
        "top_k": 1,
        "scale_by_gate": False,
        "router_bias": True,
        "router_per": "block",
        "aux_loss": "load-balance",
        "aux_weight": 0.01,
        "target_modules": [*ATTENTION, "k_proj", "o_proj", *FEED_FORWARD],
        "rank_pattern": {_PLAIN: (32,)},
    },
    # arXiv 2312.09979: dense softmax, localised balancing; which half of the experts a task prefers is the user's to say
    "loramoe": {
        "ranks": (4,) * 8,
        "alpha": 32.0,
        "gate": "softmax",
        "aux_loss": "importance",
        "aux_weight": 0.1,
        "aux_groups": (0, 1, 0, 0),
        "aux_delta": 0.1,
        "target_modules": FEED_FORWARD,
    },
    # arXiv 2310.18339: gates from the task alone; the total rank is shared out, and scales
    "moelora": {
        "ranks": (2,) * 8,
        "alpha": 32.0,
        "dropout": 0.1,
        "scaling": "alpha/sum r",
        "gate": "softmax",
        "router_input": "task",
        "num_ids": TASKS,
        "embedding_dim": 64,
    },
    # arXiv 2312.12379: the best expert of the instruction's cluster, and a universal one for the rest
    "mocle": {
        "ranks": (8,) * 5,
        "alpha": 32.0,
        "dropout": 0.1,
        "gate": "topk",
        "top_k": 1,
        "temperature": 0.05,
        "router_input": "cluster",
        "num_ids": 16,
        "embedding_dim": 384,
        "router_bias": True,
        "universal_expert": True,
    },
    # arXiv 2202.13914, as in PEFT's Poly
    "polytropon": {
        "ranks": (8,) * 4,
        "scaling": "1/r",
        "dropout": 0.0,
        "gate": "gumbel-sigmoid",
        "normalize": True,
        "router_input": "task",
        "num_ids": TASKS,
        "combine": "factors",
    },
    # arXiv 2404.19245
    "hydralora": {
        "ranks": (4,) * 4,
        "alpha": 32.0,
        "gate": "softmax",
        "shared_A": True,
        "target_modules": FEED_FORWARD,
    },
    # arXiv 2405.00361
    "adamole": {
        "ranks": (4,) * 8,
        "gate": "threshold",
        "normalize": True,
        "aux_loss": "load-balance",
        "aux_weight": 1e-3,
    },
    # arXiv 2404.15159: whole feed-forward blocks as experts, the best two of eight; plain LoRA on attention
    "mixlora": {
        "ranks": (8,) * 8,
        "gate": "topk",
        "top_k": 2,
        "normalize": True,
        "router_init": "normal",
        "router_per": "block",
        "expert_per": "block",
        "aux_loss": "load-balance",
        "aux_weight": 0.01,
        "target_modules": [*ATTENTION, "k_proj", "o_proj", *FEED_FORWARD],
        "rank_pattern": {_PLAIN: (8,)},
    },
    # arXiv 2412.14711: relu gates held at the sparsity of one expert in four
    "remoe": {
        "ranks": (8,) * 4,
        "gate": "relu",
        "aux_loss": "l1",
        "aux_weight": 1e-8,
        "target_sparsity": 0.75,
    },
    # arXiv 2202.09368; a control: what a token gets depends on later tokens
    "expert-choice": {"ranks": (8,) * 4, "gate": "expert-choice", "capacity": 2.0},
    # arXiv 2411.12787: rank-1 experts under relu gates, their activations normalised (skill space), the router the task space
    "dual-lora": {
        "ranks": (1,) * 32,
        "scaling": (2.0,) * 32,
        "gate": "relu",
        "norm_experts": True,
    },
}


def preset(name: str, **fields: Any) -> RodeConfig:
    """The configuration of a published system, with `fields` in place of its own.

    Raises:
        ValueError: no such preset, with the names that are near; or what RodeConfig says of the fields.
    """
    return RodeConfig(**preset_fields(name, **fields))


def preset_fields(name: str, **fields: Any) -> dict[str, Any]:
    """The fields of the RodeConfig that `preset` makes."""
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name), PRESETS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(PRESETS)}"
        raise ValueError(f"preset: no {name!r}; {hint}")
    return {**PRESETS[name], **fields}
