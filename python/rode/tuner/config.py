"""`RodeConfig`: every choice that the method leaves open, checked when it is made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from rode.tuner import validation as rules
from rode.tuner.peft_type import RODE
from rode.tuner.validation import AUX_LOSSES, GATES, ROUTER_INITS, ROUTER_INPUTS, SCALINGS

_LOADING = """This is a RoDE adapter: `import rode` tells PEFT what that is, and must come first.

```py
import rode
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/adapter")
```"""


@dataclass
class RodeConfig(PeftConfig):
    """Configuration of a [`RodeModel`]: a mixture of LoRA experts of different ranks (RoDE, arXiv 2407.12730).

    `y = W0 x + sum_i scaling_i * gate_i(x) * B_i A_i drop(x)` for each adapted linear layer.

    Args:
        ranks: rank r_i of each expert. One rank with `gate="none"` is plain LoRA.
        alpha: the numerator of the scaling, as LoRA's `lora_alpha`.
        dropout: probability with which elements of the experts' input are dropped in training. The router sees the whole input.
        target_modules: names (matched at the end of a module's name), a regex over the whole name, or "all-linear". Default: q_proj
            and v_proj, in a model with a vision tower those of its language model. A vision tower or projector is adapted
            only where an entry names it (such as `.*vision_tower.*q_proj`).
        exclude_modules: names or a regex, taken out of target_modules.
        gate: what becomes of the logits. "relu" (RoDE: experts may be closed, exactly and for each token); "softmax" (dense);
            "topk" (softmax values of the top_k largest, zeros for the rest); "sigmoid"; "gumbel-sigmoid" (a relaxed Bernoulli
            sample in training, the sigmoid otherwise); "threshold" (what of the softmax is above a learned threshold, AdaMoLE);
            "expert-choice" (each expert takes its tokens: a control that is not causal and refuses to generate); "none" (gates
            are 1: plain LoRA, which can be merged).
        router_input: where logits come from. "token" (a linear map of the layer's input); "sequence" (of its mean over the
            prompt's tokens; in training the prompt is what `labels` leaves out); "task" and "cluster" (a table with a row for
            each id, read by `rode_task_ids` or `rode_cluster_ids`, which a forward pass or `generate` must be given); "constant"
            (one learned row: can be merged).
        num_ids: rows of the table: tasks or clusters.
        embedding_dim: the table holds embeddings of this size, and a linear router makes logits of them. None: it holds logits.
        router_per: "projection", or "block": the adapted projections of one attention or feed-forward block share the gates
            that its first one computes.
        expert_per: "projection", or "block": an expert is the whole feed-forward block with its own adapters, and the blocks'
            outputs are summed under the gates (MixLoRA); costs top_k passes through the block.
        temperature: softmax and sigmoids divide their logits by it.
        top_k: experts for each token, with gate "topk".
        normalize: divide gates by their sum over experts.
        scale_by_gate: False leaves a chosen expert's output unscaled, so that only an auxiliary loss trains the router.
        max_threshold: of gate "threshold"; None for 1/N, which leaves at least one expert open.
        capacity: mean number of experts for each token, with gate "expert-choice"; None for 2.
        norm_experts: layer normalisation, with a trained factor and shift, of each token's R activations A x before the gates
            (Dual-LoRA).
        shared_A: all experts share one A, of their common rank (HydraLoRA).
        universal_expert: the last expert is not routed: its gate is 1 minus the largest of the others' (MoCLE).
        combine: "outputs" (`sum_i g_i B_i A_i x`), or "factors": A and B are averaged separately (`(sum_i g_i B_i)(sum_i g_i A_i)
            x`, Polytropon), for gates that are the same for a whole sequence and experts of one rank.
        aux_loss: added to the training loss. "none"; "load-balance" (N sum_i f_i P_i, Switch and Mixtral); "importance" (squared
            coefficient of variation of the experts' summed gates; LoRAMoE's localised one with aux_groups); "l1" (mean over tokens
            of the summed gates; ReMoE's with target_sparsity). The mean over an adapter's routers; padding is left out.
        aux_weight: factor of that loss; None for 0.01, for "l1" 1e-8.
        aux_groups: for "importance": the group (0 or 1) of each task. The first half of the experts is group 0, the rest group 1;
            gates of a task's own group count 1 + aux_delta, the other's 1 - aux_delta. Needs `rode_task_ids`.
        aux_delta: see aux_groups.
        target_sparsity: for "l1": share of closed gates that `rode.tuner.HoldSparsity` (a Trainer callback) steers to.
        router_bias: give the router a bias. Default False: the paper's Eq. 3 has none.
        router_init: "kaiming" (uniform, as nn.Linear does; the default, because the paper says nothing: logits then have
            zero mean, so about half of the relu gates start open and every expert sees tokens; a table of logits starts uniform
            within 0.001, as Polytropon's), "normal" (deviation 0.02), or "open" (weight 0, bias 1: each relu gate starts at
            exactly 1, as a plain sum of LoRA experts; needs router_bias, or a table of logits).
        scaling: "alpha/r" (the paper), "alpha/sqrt(r)" (rank-stabilised), "alpha/sum r" (MOELoRA), "1/r" (alpha is not used), or
            one number per expert.
        rank_pattern: regex (matched at the end of a module's name) to the ranks of those layers.
        alpha_pattern: regex to the alpha of those layers.
        layers_to_transform: indices of the blocks to adapt; not with a regex as target_modules.
        layers_pattern: name of the list that holds the blocks, where it is not found by itself.
        modules_to_save: other modules to train and to save whole (such as the projector).
        init_weights: True starts B at 0, so that training starts from the base model; False starts it at random, for tests.

    Raises:
        TypeError, ValueError: naming the field, what it got and what was wanted.
    """

    ranks: tuple[int, ...] = field(default=(2, 4, 8, 16), metadata={"help": "Rank of each expert."})
    alpha: float = field(default=16.0, metadata={"help": "Numerator of the scaling, as LoRA's lora_alpha."})
    dropout: float = field(
        default=0.05, metadata={"help": "Dropout of the experts' input (not of the router's), in [0, 1)."}
    )
    target_modules: list[str] | set[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names, one regex, or 'all-linear'. Default: q_proj and v_proj of the language model. The vision tower and the "
            "projector are adapted only where an entry names them."
        },
    )
    exclude_modules: list[str] | set[str] | str | None = field(
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = RODE
        rules.check(self)

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
    def watches_passes(self) -> bool:
        """Whether layers need to know of the forward pass that they are part of (`rode.tuner.context`)."""
        return (
            self.aux_loss != "none"
            or self.gate == "expert-choice"
            or self.router_per == "block"
            or self.router_input in ("task", "cluster", "sequence")
        )

    def routed_experts(self, experts: int) -> int:
        """Of a layer's experts, those that the router has a logit for."""
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

    def to_dict(self) -> dict[str, Any]:
        """As PEFT's, with sets as sorted lists, so that one configuration has one JSON text."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; a model card beside it learns that `import rode` must come before loading."""
        super().save_pretrained(save_directory, **kwargs)
        card = Path(save_directory, "README.md")
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            if _LOADING not in text:
                gap = "Use the code below to get started with the model.\n\n[More Information Needed]"  # of PEFT's card
                found = gap in text
                text = text.replace(gap, _LOADING, 1) if found else f"{text.rstrip()}\n\n{_LOADING}\n"
                aside = card.with_suffix(".md.new")
                aside.write_text(text, encoding="utf-8")
                aside.replace(card)
