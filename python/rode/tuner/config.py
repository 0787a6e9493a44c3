"""`RodeConfig`: every choice that the method leaves open, checked when it is made."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from rode.tuner import validation
from rode.tuner.fields import RodeFields
from rode.tuner.fingerprint import check_config, config_checksum, tensors_checksum
from rode.tuner.peft_type import RODE
from rode_food.atomic import write_text

_LOADING = """This is a RoDE adapter: `import rode` tells PEFT what that is, and must come first.

```py
import rode
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/adapter")
```"""


@dataclass
class RodeConfig(RodeFields):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base: dict[str, Any] | None = None  # of the model that the adapter is on; see `fingerprint`
        self.peft_type = RODE
        validation.check(self)

    def to_dict(self) -> dict[str, Any]:
        """Converts as PEFT does, with sets as sorted lists, so that one configuration has one JSON text."""
        return {k: sorted(v) if isinstance(v, set) else v for k, v in super().to_dict().items()}

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Reads as PEFT does; warns with AdapterMismatch if the configuration was edited after it was saved."""
        values: dict[str, Any] = super().from_json_file(path_json_file, **kwargs)
        if isinstance(values, dict):
            check_config(values, path_json_file)
        return values

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves as PEFT does, with what the adapter belongs to (see `rode.tuner.fingerprint`); a model card beside it says that
        `import rode` must come before loading."""
        # PEFT's model names a mapping, and has just written the tensors; others write them later
        with_tensors = "auto_mapping_dict" in kwargs
        super().save_pretrained(save_directory, **kwargs)
        file, tensors = Path(save_directory, CONFIG_NAME), Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        values = json.loads(file.read_text(encoding="utf-8"))
        values["belongs_to"] = {
            "base": self.base,
            "config": config_checksum(values),
            "tensors": tensors_checksum(load_file(tensors)) if with_tensors and tensors.is_file() else None,
        }
        write_text(file, json.dumps(values, indent=2, sort_keys=True))
        card = Path(save_directory, "README.md")
        if card.is_file():
            text = card.read_text(encoding="utf-8")
            if _LOADING not in text:
                gap = "Use the code below to get started with the model.\n\n[More Information Needed]"  # of PEFT's card
                found = gap in text
                text = text.replace(gap, _LOADING, 1) if found else f"{text.rstrip()}\n\n{_LOADING}\n"
                write_text(card, text)
