"""Weights of the base model that are trained beside an adapter: which they are, and the file that holds them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import nn

from rode.tuner import RodeConfig
from rode.tuner.fingerprint import weights_of_base
from rode.vlm.load import BASE_FILE, base_model, language_model, plain_name, projector_name
from rode_food.atomic import written_aside

if TYPE_CHECKING:
    from rode.training.experiment import Experiment
    from rode.vlm.load import Model

Part = Literal["adapter", "projector", "language model", "vision tower"]
"""Parts of a model that learn at rates of their own."""


def trains_projector(experiment: Experiment) -> bool:
    """Whether the projector learns beside the adapter, or by itself in stage "projector"."""
    training = experiment.training
    return (
        experiment.stage == "projector"
        or training.projector_learning_rate is not None
        or training.train_base in ("projector", "all")
    )


def rates_of(experiment: Experiment) -> dict[Part, float]:
    """The highest learning rate of each part; a part without one has the adapter's."""
    training = experiment.training
    given: dict[Part, float | None] = {
        "adapter": training.learning_rate,
        "projector": training.projector_learning_rate,
        "language model": training.language_model_learning_rate,
        "vision tower": training.vision_learning_rate,
    }
    return {part: training.learning_rate if rate is None else rate for part, rate in given.items()}


def _text_parameters(model: Model) -> set[nn.Parameter]:
    """The language model's, its embeddings and its head."""
    head = model.get_output_embeddings()
    return {*language_model(model).parameters(), *([] if head is None else head.parameters())}


def _projector_parameters(model: Model) -> set[nn.Parameter]:
    name = projector_name(model)
    return set() if name is None else set(base_model(model).get_submodule(name).parameters())


def base_parameters(model: Model, train_base: str) -> list[nn.Parameter]:
    """The parameters that `training.train_base` adds to adapter and projector, of a model that has no adapter yet.

    Raises:
        ValueError: some of them are quantised.
    """
    if train_base not in ("language_model", "all"):
        return []
    text, projector = _text_parameters(model), _projector_parameters(model)
    chosen = [
        (name, p)
        for name, p in model.named_parameters()
        if p not in projector and (train_base == "all" or p in text)
    ]
    quantised = next((name for name, p in chosen if not p.is_floating_point() or p.element_size() < 2), None)
    if quantised is not None or getattr(model, "is_quantized", False):
        raise ValueError(
            f"training.train_base: expected none for a quantised model, got {train_base}: {quantised or 'its weights'} cannot "
            "take a step; load the model without quantisation"
        )
    return [p for _, p in chosen]


def trained_base(model: Model) -> dict[str, nn.Parameter]:
    """Trained parameters of the base model under an adapter, without the projector, by their names in its checkpoint."""
    if getattr(model, "get_base_model", None) is None:
        return {}
    base = base_model(model)
    adapters = {
        parameter
        for module in base.modules()
        if isinstance(module, BaseTunerLayer)
        for name, parameter in cast("nn.Module", module).named_parameters()
        if not name.startswith("base_layer.")
    }
    return {
        plain_name(name): parameter
        for name, parameter in base.named_parameters()
        if parameter.requires_grad and parameter not in adapters and ".modules_to_save." not in f".{name}"
    }


def part_of(model: Model) -> dict[nn.Parameter, Part]:
    """The part of each trained parameter."""
    own, text = projector_name(model), _text_parameters(model)
    base = set(trained_base(model).values())
    parts: dict[nn.Parameter, Part] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if own is not None and f".{own}." in f".{name}":
            parts[parameter] = "projector"
        elif parameter in base:
            parts[parameter] = "language model" if parameter in text else "vision tower"
        else:
            parts[parameter] = "adapter"
    return parts


def tell_of_base(model: Model) -> None:
    """Let adapters that are saved next say that they belong to the base model's weights as they are now, if those are trained."""
    if trained_base(model):
        for name, config in getattr(model, "peft_config", {}).items():
            if isinstance(config, RodeConfig):
                config.base = weights_of_base(model, name)


def save_base(model: Model, directory: str | Path) -> None:
    """Write the trained weights of the base model, if there are any, to `BASE_FILE` (aside, then renamed)."""
    weights = trained_base(model)
    if weights:
        with written_aside(Path(directory) / BASE_FILE) as aside:
            save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, aside)
