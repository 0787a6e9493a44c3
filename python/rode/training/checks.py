"""Checks of a config beyond the types of its values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rode.training.adapters import adapter_config
from rode_food.settings import SettingsError as ConfigError
from rode_food.settings import refuse_not_finite
from rode_food.source import Source

if TYPE_CHECKING:
    from peft import PeftConfig

    from rode.baselines.moe_llava import MoeConfig
    from rode.training.experiment import Experiment

_POSITIVE = {
    "training": (
        "batch_size",
        "gradient_accumulation",
        "devices",
        "questions_per_picture",
        "epochs",
        "logging_steps",
        "save_steps",
        "learning_rate",
        "projector_learning_rate",
        "language_model_learning_rate",
        "vision_learning_rate",
        "epsilon",
        "max_steps",
        "max_length",
        "max_minutes",
        "max_nonfinite",
    ),
    "model": ("picture_pool",),
    "evaluation": ("batch_size", "max_new_tokens", "limit"),
}
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "warmup_steps", "seed", "save_total_limit", "workers")


def check(experiment: Experiment) -> None:
    """Checks beyond types."""
    training = experiment.training
    for section, names in _POSITIVE.items():
        for name in names:
            value = getattr(getattr(experiment, section), name)
            if value is not None and value <= 0:
                raise ConfigError(f"{section}.{name}: expected more than 0, got {value}")
    for name in _NOT_NEGATIVE:
        if (value := getattr(training, name)) < 0:
            raise ConfigError(f"training.{name}: expected at least 0, got {value}")
    if experiment.model.picture_pool > 1 and experiment.model.vision_features == "live":
        raise ConfigError(
            "model.picture_pool: expected 1 with vision_features live, whose pictures are not pooled; set memory or disk"
        )
    for name in ("fsdp", "deepspeed"):
        refuse_not_finite(getattr(training, name), f"training.{name}")
    refuse_not_finite(experiment.adapter, "adapter")
    _check_sharding(experiment)
    _check_base(experiment)
    if len(training.betas) != 2:
        raise ConfigError(f"training.betas: expected two numbers, got {training.betas}")
    for i, beta in enumerate(training.betas):
        if not 0 <= beta < 1:
            raise ConfigError(f"training.betas[{i}]: expected at least 0 and less than 1, got {beta}")
    if not experiment.data.sources:
        raise ConfigError("data.sources: expected at least one source, got none")
    for i, source in enumerate(experiment.data.sources):
        try:
            Source(**vars(source))
        except ValueError as error:
            raise ConfigError(f"data.sources[{i}]: {error}") from error
    if experiment.stage == "projector":
        if experiment.adapter:
            raise ConfigError("adapter: stage 'projector' trains no adapter; leave it out")
        if training.projector_learning_rate is not None:
            raise ConfigError(
                "training.projector_learning_rate: in stage 'projector' it is training.learning_rate"
            )
    else:
        _check_routing(experiment, adapter_config(experiment))


def _check_base(experiment: Experiment) -> None:
    """Checks that the part of the base model which is to be trained can be."""
    training, base = experiment.training, experiment.training.train_base
    for name, bases in (
        ("language_model_learning_rate", ("language_model", "all")),
        ("vision_learning_rate", ("all",)),
    ):
        if getattr(training, name) is not None and base not in bases:
            raise ConfigError(
                f"training.{name}: expected null with train_base {base}, which does not train that part; set "
                f"training.train_base={bases[-1]}"
            )
    if base == "none":
        return
    if experiment.stage == "projector":
        raise ConfigError(
            "training.train_base: expected none in stage 'projector', which trains the projector alone"
        )
    if base == "projector":
        return
    if experiment.adapter.get("method") == "moe-llava":
        raise ConfigError(f"training.train_base: expected none or projector with moe-llava, got {base}")
    if training.fsdp is not None or training.deepspeed is not None:
        name = "fsdp" if training.fsdp is not None else "deepspeed"
        raise ConfigError(
            f"training.train_base: expected none or projector with training.{name}, got {base}: the base model's weights are saved "
            "whole by each process; leave the sharding out"
        )
    if base == "all" and experiment.model.vision_features != "live":
        raise ConfigError(
            f"model.vision_features: expected live with training.train_base all, got {experiment.model.vision_features}: features "
            "of a tower that is trained change at every step"
        )


_SAID_ELSEWHERE = {
    "optimizer": "training.learning_rate, weight_decay, betas and epsilon say it, with the projector's rate apart",
    "scheduler": "training.schedule and warmup_steps say it",
    "bf16": "model.dtype says what frozen weights are held in, and trained ones are float32",
    "fp16": "model.dtype says what frozen weights are held in, and trained ones are float32",
}
"""Keys of DeepSpeed's configuration whose effect other keys have already."""


def _check_sharding(experiment: Experiment) -> None:
    """Checks that what the processes share out between them can be."""
    fsdp, deepspeed = experiment.training.fsdp, experiment.training.deepspeed
    if deepspeed is not None and experiment.training.on_nonfinite == "skip":
        raise ConfigError("training.on_nonfinite: expected stop with DeepSpeed, which takes its steps itself")
    if fsdp is None and deepspeed is None:
        return
    if experiment.model.dtype == "float16":
        name = "deepspeed" if fsdp is None else "fsdp"
        raise ConfigError(
            f"model.dtype: expected bfloat16 or float32 with training.{name}, whose shares of a gradient overflow one by one; got "
            "float16"
        )
    if fsdp is not None and deepspeed is not None:
        raise ConfigError("training.fsdp: expected null beside training.deepspeed; set one of the two")
    if fsdp is not None and int(fsdp.get("version", 2)) != 2:
        raise ConfigError(f"training.fsdp.version: expected 2, got {fsdp['version']}")
    if fsdp is not None and (kind := fsdp.get("state_dict_type", "FULL_STATE_DICT")) != "FULL_STATE_DICT":
        raise ConfigError(
            f"training.fsdp.state_dict_type: expected FULL_STATE_DICT, in which adapters are saved; got {kind!r}"
        )
    for key, instead in _SAID_ELSEWHERE.items():
        if deepspeed is not None and key in deepspeed:
            raise ConfigError(f"training.deepspeed.{key}: leave it out; {instead}")
    stage = 3 if deepspeed is None else zero_stage(deepspeed)
    if stage == 3 and (experiment.stage == "projector" or experiment.adapter.get("method") == "moe-llava"):
        name = "stage 'projector'" if experiment.stage == "projector" else "adapter.method 'moe-llava'"
        raise ConfigError(
            f"training.{'deepspeed' if fsdp is None else 'fsdp'}: {name} saves weights that must be whole in each process; use "
            "ZeRO stage 2 (configs/distributed/zero2.yaml), or neither"
        )


def zero_stage(deepspeed: dict[str, Any]) -> int:
    """The stage of ZeRO in DeepSpeed's own configuration. Raises ConfigError for what is none."""
    zero = deepspeed.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if stage not in (1, 2, 3):
        raise ConfigError(f"training.deepspeed.zero_optimization.stage: expected 1, 2 or 3, got {stage!r}")
    return int(stage)


def _check_routing(experiment: Experiment, config: PeftConfig | MoeConfig) -> None:
    """Checks that data and model have what the adapter's router reads."""
    by_row = (
        getattr(config, "router_input", "token") in ("task", "cluster", "sequence")
        or getattr(config, "aux_groups", None)
        or getattr(config, "gate", "") == "expert-choice"
        or getattr(config, "n_tasks", None)
    )
    if by_row and experiment.training.questions_per_picture > 1:
        raise ConfigError(
            "training.questions_per_picture: this adapter treats a sequence as one question, so its picture cannot be shared by "
            f"several; set it to 1, got {experiment.training.questions_per_picture}"
        )
    if getattr(config, "id_input", None) == "rode_cluster_ids" and experiment.model.clusters is None:
        raise ConfigError(
            "model.clusters: router_input 'cluster' wants the file that `rode fit-clusters` writes"
        )
