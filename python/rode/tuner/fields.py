"""The fields of a `RodeConfig`, and what follows from them alone; `rode.tuner.config` says what each one means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from peft.config import PeftConfig

GATES = (
    "relu",
    "softmax",
    "topk",
    "sigmoid",
    "gumbel-sigmoid",
    "threshold",
    "expert-choice",
    "none",
)
ROUTER_INPUTS = ("token", "sequence", "task", "cluster", "constant")
ROUTER_INITS = ("kaiming", "normal", "open")
SCALINGS = ("alpha/r", "alpha/sqrt(r)", "alpha/sum r", "1/r")
AUX_LOSSES = ("none", "load-balance", "importance", "l1")
SCOPES = ("projection", "block")
COMBINES = ("outputs", "factors")
Targets = list[str] | set[str] | str  # names of modules, or a regex


@dataclass
class RodeFields(PeftConfig):
    """The values of a configuration, unchecked."""

    ranks: tuple[int, ...] = field(default=(2, 4, 8, 16), metadata={"help": "Rank of each expert."})
    alpha: float = field(default=16.0, metadata={"help": "Numerator of the scaling, as LoRA's lora_alpha."})
    dropout: float = field(
        default=0.05, metadata={"help": "Dropout of the experts' input (not of the router's), in [0, 1)."}
    )
    target_modules: Targets | None = field(
        default=None,
        metadata={
            "help": "Names, one regex, or 'all-linear'. Default: q_proj and v_proj of the language model. The vision tower and the "
            "projector are adapted only where an entry names them."
        },
    )
    exclude_modules: Targets | None = field(
        default=None, metadata={"help": "Names or one regex of modules to leave alone."}
    )
    gate: str = field(default="relu", metadata={"help": f"One of {', '.join(GATES)}."})
    router_input: str = field(default="token", metadata={"help": f"One of {', '.join(ROUTER_INPUTS)}."})
    num_ids: int | None = field(default=None, metadata={"help": "Number of tasks or clusters."})
    embedding_dim: int | None = field(
        default=None, metadata={"help": "Size of their embeddings; None: the table holds logits."}
    )
    router_per: str = field(default="projection", metadata={"help": "'projection' or 'block'."})
    expert_per: str = field(default="projection", metadata={"help": "'projection' or 'block'."})
    temperature: float = field(default=1.0, metadata={"help": "Divides logits before softmax or sigmoid."})
    top_k: int | None = field(default=None, metadata={"help": "Experts per token, with gate='topk'."})
    normalize: bool = field(default=False, metadata={"help": "Divide gates by their sum."})
    scale_by_gate: bool = field(
        default=True, metadata={"help": "False: a chosen expert is not multiplied by its gate."}
    )
    max_threshold: float | None = field(default=None, metadata={"help": "Of gate='threshold'; None for 1/N."})
    capacity: float | None = field(
        default=None, metadata={"help": "Mean experts per token, with gate='expert-choice'; None for 2."}
    )
    norm_experts: bool = field(
        default=False, metadata={"help": "Layer normalisation of A x before the gates."}
    )
    shared_A: bool = field(default=False, metadata={"help": "One A for all experts."})
    universal_expert: bool = field(
        default=False, metadata={"help": "The last expert's gate is 1 - the largest."}
    )
    combine: str = field(default="outputs", metadata={"help": "'outputs' or 'factors'."})
    aux_loss: str = field(default="none", metadata={"help": f"One of {', '.join(AUX_LOSSES)}."})
    aux_weight: float | None = field(default=None, metadata={"help": "Factor of the auxiliary loss."})
    aux_groups: tuple[int, ...] | None = field(
        default=None, metadata={"help": "Group (0 or 1) of each task, for aux_loss='importance'."}
    )
    aux_delta: float | None = field(
        default=None, metadata={"help": "Strength of the groups, in [0, 1]; None for 0.1."}
    )
    target_sparsity: float | None = field(
        default=None, metadata={"help": "Share of closed gates to hold, for aux_loss='l1'."}
    )
    router_bias: bool = field(default=False, metadata={"help": "Give the router a bias."})
    router_init: str = field(default="kaiming", metadata={"help": f"One of {', '.join(ROUTER_INITS)}."})
    scaling: str | tuple[float, ...] = field(
        default="alpha/r", metadata={"help": f"One of {', '.join(SCALINGS)}, or one number per expert."}
    )
    rank_pattern: dict[str, tuple[int, ...]] = field(
        default_factory=dict, metadata={"help": "Regex over module names to the ranks of those layers."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Regex over module names to the alpha of those layers."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer blocks to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the module list that holds the blocks; with layers_to_transform."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Other modules to train and save whole."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: B starts at 0. False: B starts at random (for tests)."}
    )
    belongs_to: dict[str, Any] | None = field(
        default=None,
        compare=False,
        metadata={"help": "Written when an adapter is saved, and compared when it is loaded."},
    )

    @property
    def routed(self) -> bool:
        """Whether gates are computed at all."""
        return self.gate != "none"

    @property
    def constant_gates(self) -> bool:
        """Whether gates are the same for every input, so that the adapter is one matrix."""
        return not self.routed or self.router_input == "constant"

    @property
    def id_input(self) -> str | None:
        """Name of the ids that the router reads ("rode_task_ids", "rode_cluster_ids"), or None."""
        return {"task": "rode_task_ids", "cluster": "rode_cluster_ids"}.get(self.router_input)

    @property
    def table_of_logits(self) -> bool:
        return self.router_input == "constant" or (self.id_input is not None and self.embedding_dim is None)

    @property
    def needs_forward_hooks(self) -> bool:
        """Whether layers need to know of the forward pass that they are part of (`rode.tuner.context`)."""
        return (
            self.aux_loss != "none"
            or self.gate == "expert-choice"
            or self.router_per == "block"
            or self.router_input in ("task", "cluster", "sequence")
        )

    def routed_experts(self, experts: int) -> int:
        """The number of a layer's experts that the router has a logit for."""
        return experts - 1 if self.universal_expert else experts

    def needs_router(self, experts: int) -> bool:
        """Whether a layer of so many experts has a router: a softmax over one expert is 1 and needs none."""
        gates_of_one = {
            "softmax": True,
            "topk": self.normalize or not self.scale_by_gate,
            "threshold": self.normalize,
        }
        alone = experts == 1 and gates_of_one.get(self.gate, False)
        return self.routed and not alone

    def expert_scaling(self, ranks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
        """The factor of each expert of a layer with these ranks and this alpha."""
        if not isinstance(self.scaling, str):
            return self.scaling
        if self.scaling == "alpha/sum r":
            return (alpha / sum(ranks),) * len(ranks)
        factor = {
            "alpha/r": lambda r: alpha / r,
            "alpha/sqrt(r)": lambda r: alpha / math.sqrt(r),
            "1/r": lambda r: 1.0 / r,
        }[self.scaling]
        return tuple(factor(r) for r in ranks)
