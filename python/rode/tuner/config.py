"""`RodeConfig`: every choice that the method leaves open, checked when it is made."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from peft.config import PeftConfig

from rode.tuner.peft_type import RODE

GATES = ("relu", "softmax", "top1", "none")
ROUTER_INITS = ("kaiming", "normal", "open")
SCALINGS = ("alpha/r", "alpha/sqrt(r)", "alpha/sum r", "1/r")

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
        gate: "relu" (RoDE: experts may be closed, exactly and for each token), "softmax" (dense), "top1" (the largest softmax value
            is the gate of its expert, every other gate is 0; the gradient reaches all logits through that value), or "none"
            (gates are 1: plain LoRA, which can be merged).
        router_bias: give the router a bias. Default False: the paper's Eq. 3 has none.
        router_init: "kaiming" (uniform, as nn.Linear does; the default, because the paper says nothing: logits then have
            zero mean, so about half of the relu gates start open and every expert sees tokens), "normal" (deviation
            0.02), or "open" (weight 0, bias 1: each relu gate starts at exactly 1, as a plain sum of LoRA experts; needs
            router_bias).
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
        self.ranks = _ranks("ranks", self.ranks)
        self.alpha = _positive("alpha", self.alpha)
        if not _is_real(self.dropout) or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a number in [0, 1), got {self.dropout!r}")
        _choice("gate", self.gate, GATES)
        _choice("router_init", self.router_init, ROUTER_INITS)
        self.scaling = _scaling(self.scaling)
        for name in ("rank_pattern", "alpha_pattern"):
            _check_pattern(name, getattr(self, name))
        self.rank_pattern = {k: _ranks(f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()}
        self.alpha_pattern = {k: _positive(f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()}
        self._check_router()
        self._check_scaling()
        self._check_modules()

    def _check_router(self) -> None:
        if self.gate == "none" and (self.router_bias or self.router_init != "kaiming"):
            raise ValueError("gate='none' has no router: leave router_bias and router_init at their defaults")
        if self.router_init == "open" and not (self.router_bias and self.gate == "relu"):
            raise ValueError(
                "router_init='open' starts relu gates at 1 through the router's bias: it needs gate='relu' and router_bias=True, "
                f"got gate={self.gate!r} and router_bias={self.router_bias}"
            )

    def _check_scaling(self) -> None:
        if isinstance(self.scaling, str):
            return
        for name, ranks in (("ranks", self.ranks), *self.rank_pattern.items()):
            if len(ranks) != len(self.scaling):
                raise ValueError(
                    f"scaling: expected one number per expert, got {len(self.scaling)} for the {len(ranks)} experts of {name}"
                )

    def _check_modules(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _check_regex(name, value)
            elif value is not None:
                if not all(isinstance(entry, str) and entry for entry in value):
                    raise TypeError(f"{name}: expected module names or one regex, got {value!r}")
                setattr(self, name, set(value))
        for name in ("layers_to_transform", "layers_pattern"):
            if getattr(self, name) is not None and isinstance(self.target_modules, str):
                raise ValueError(
                    f"{name} selects among names: give target_modules as a list, or put the layers into its regex"
                )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform counts: set both or neither")

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


def _is_real(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _ranks(name: str, value: object) -> tuple[int, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not value:
        raise TypeError(f"{name}: expected one rank per expert, such as (2, 4, 8, 16), got {value!r}")
    for rank in value:
        if isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 1:
            raise ValueError(f"{name}: expected positive whole numbers, got {rank!r} in {value!r}")
    return tuple(int(rank) for rank in value)


def _positive(name: str, value: object) -> float:
    if not _is_real(value) or value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def _scaling(value: object) -> str | tuple[float, ...]:
    if isinstance(value, str):
        _choice("scaling", value, SCALINGS)
        return value
    if not isinstance(value, Sequence) or not all(_is_real(factor) for factor in value):
        raise TypeError(
            f"scaling: expected one of {', '.join(map(repr, SCALINGS))}, or one finite number per expert, got {value!r}"
        )
    return tuple(float(factor) for factor in value)


def _check_pattern(name: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise TypeError(f"{name}: expected a mapping from regex to value, got {value!r}")
    for pattern in value:
        _check_regex(name, pattern)


def _check_regex(name: str, pattern: object) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}: {pattern!r} is not a regular expression ({error})") from None
