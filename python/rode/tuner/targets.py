"""The modules that an adapter goes on: the language model's, and never a vision tower that nobody named."""

from __future__ import annotations

import difflib
import re

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PretrainedConfig

from rode.tuner.config import RodeConfig
from rode.tuner.fields import Targets

DEFAULT_NAMES = ("q_proj", "v_proj")
# Names of the projections to queries and values in models that PEFT's table does not list, or lists under names of another version.
_NAMES = (
    DEFAULT_NAMES,
    ("qkv_proj",),
    ("query_key_value",),
    ("query", "value"),
    ("q", "v"),
    ("q_lin", "v_lin"),
    ("c_attn",),
    ("Wqkv",),
)
# The language model within a multi-modal one, whose towers often have a q_proj and a v_proj too.
_LANGUAGE_MODEL = r".*(language_model|text_model).*\."
VISION_LANGUAGE_REGEX = _LANGUAGE_MODEL + r"(q_proj|v_proj)"

# Last part of the names of what turns pictures or sound into the language model's inputs, in transformers and LLaVA's own code.
_TOWER = re.compile(
    r"(vision|visual|image|audio)(_(?!language)\w+)?|(multi_modal|mm)_projector|connector|aligner|embed_(vision|audio)"
)
# Keys and values of cross-attention are made of what a tower or an encoder gives.
_CROSS_INPUT = re.compile(r".*cross_?att\w*\.(\w+\.)*(k|v|key|value)(_proj)?")
_KINDS = (("vision", "visual", "image"), ("audio",))  # a word of a kind names every tower of that kind


def towers(model: nn.Module) -> tuple[str, ...]:
    """Names of a multi-modal model's towers and projectors; empty for a plain language model or a plain vision model.

    The encoder of a model that reads sound or pictures and writes text (Whisper) counts as one.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and getattr(model, "main_input_name", "") != "input_ids":
        return tuple(name for name, _ in model.named_modules() if name.rpartition(".")[2] == "encoder")[:1]
    multi_modal = any(
        getattr(config, key, None) is not None for key in ("vision_config", "mm_vision_tower", "audio_config")
    )
    names = [name for name, _ in model.named_modules() if name]
    if not multi_modal:  # a model without a transformers configuration
        multi_modal = any(name.rpartition(".")[2] == "language_model" for name in names)
    if not multi_modal:
        return ()
    found: list[str] = []
    for name in names:  # parents come before children
        if _TOWER.fullmatch(name.rpartition(".")[2]) and not under(name, found):
            found.append(name)
    return tuple(found)


def under(name: str, roots: tuple[str, ...] | list[str]) -> str | None:
    """The root that `name` is or lies below, else None."""
    return next((root for root in roots if name == root or name.startswith(root + ".")), None)


def reads_other_tokens(name: str) -> bool:
    """Whether the layer makes keys or values of a cross-attention (Mllama's), from tokens that are not those of input_ids."""
    return _CROSS_INPUT.fullmatch(name) is not None


def default_targets(model: nn.Module, config: RodeConfig) -> str | set[str]:
    """The projections to queries and values (the paper's Fig. 4), in a multi-modal model those of its language model.

    Their names are those of PEFT's table for LoRA, if the model's type is in it and has them; else what the model has.
    """
    roots = towers(model)
    free = [name for name, _ in model.named_modules() if not under(name, roots)]
    own = getattr(model, "config", None)
    text = own.get_text_config(decoder=True) if isinstance(own, PretrainedConfig) else own
    listed = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(getattr(text, "model_type", ""))
    ends = {name.rpartition(".")[2] for name in free}
    candidates = _NAMES if listed is None or isinstance(listed, str) else (tuple(listed), *_NAMES)
    names = next((names for names in candidates if ends.issuperset(names)), DEFAULT_NAMES)
    regex = f"{_LANGUAGE_MODEL}({'|'.join(names)})"
    # A list serves everywhere, for towers stay closed to bare names; the regex says so to other programs, too.
    by_regex = (
        roots and config.layers_to_transform is None and any(re.fullmatch(regex, name) for name in free)
    )
    return regex if by_regex else set(names)


def named_towers(target_modules: Targets, roots: tuple[str, ...]) -> tuple[str, ...]:
    """The towers that target_modules asks for by name, as `.*vision_tower.*q_proj` does and `q_proj` or `.*q_proj` do not."""
    text = target_modules if isinstance(target_modules, str) else " ".join(target_modules)
    opened = []
    for root in roots:
        last = root.rpartition(".")[2]
        same_kind = any(any(w in last for w in words) and any(w in text for w in words) for words in _KINDS)
        if re.search(rf"\b{last}\b", text) or same_kind:
            opened.append(root)
    return tuple(opened)


def near_misses(
    model: nn.Module, target_modules: Targets, closed: tuple[str, ...] = (), limit: int = 6
) -> list[str]:
    """Names of linear layers outside of `closed` that resemble what target_modules asked for, best first."""
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "in_features", None), int)
        and not name.endswith("base_layer")
        and not under(name, closed)
    ]
    if isinstance(target_modules, str):
        wanted = re.findall(r"\w{2,}", target_modules.replace(r"\.", " "))
    else:
        wanted = sorted(target_modules)
    tails: dict[str, str] = {}  # the end of a name, and one whole name that ends so
    for name in linear:
        tails.setdefault(name.rpartition(".")[2], name)
    close: list[str] = []
    for word in wanted:
        tail = word.rpartition(".")[2]
        close += [t for t in difflib.get_close_matches(tail, tails, n=3, cutoff=0.5) if t not in close]
    return [f"{tail} (as in {tails[tail]})" for tail in (close or sorted(tails))[:limit]]
