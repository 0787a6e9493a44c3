"""The adapter that a config describes."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rode_food.settings import SettingsError as ConfigError
from rode_food.settings import did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig

    from rode.baselines.moe_llava import MoeConfig
    from rode.training.experiment import Experiment


def adapter_config(experiment: Experiment) -> PeftConfig | MoeConfig:
    """The PEFT configuration (or MoeConfig) that the config's `adapter` describes, every key checked."""
    values = dict(experiment.adapter)
    method = values.pop("method", "rode")
    cls: type[PeftConfig | MoeConfig]
    if method == "peft":
        cls, values = _peft_class(values)
    elif method == "rode":
        from rode.tuner import RodeConfig as cls
        from rode.tuner.presets import preset_fields
        from rode.tuner.targets import VISION_LANGUAGE_REGEX

        if "preset" in values:
            try:
                values = preset_fields(values.pop("preset"), **values)
            except ValueError as error:
                raise ConfigError(f"adapter.{error}") from error
        if values.get("layers_to_transform") is None:  # which selects among names, where a regex says it all
            values.setdefault("target_modules", VISION_LANGUAGE_REGEX)
    elif method == "moe-llava":
        from rode.baselines.moe_llava import MoeConfig as cls
    else:
        raise ConfigError(f"adapter.method: expected one of rode, peft, moe-llava, got {method!r}")
    known = {f.name for f in fields(cls)} - {
        "peft_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "belongs_to",
    }
    for key in values:
        if key not in known:
            raise ConfigError(f"adapter.{key}: no such key; {did_you_mean(str(key), known)}")
    if method != "moe-llava":
        values = {"task_type": "CAUSAL_LM", **values}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"adapter: {error}") from error


def _peft_class(values: dict[str, Any]) -> tuple[type[PeftConfig], dict[str, Any]]:
    """PEFT's configuration class for `peft_type`, and the other values; default targets are the language model's."""
    from peft.config import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from rode.tuner.targets import VISION_LANGUAGE_REGEX

    known = {str(getattr(kind, "value", kind)): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    name = values.pop("peft_type", None)
    if name not in known or name == "RODE":
        raise ConfigError(
            f"adapter.peft_type: expected a method of PEFT such as LORA, POLY or XLORA, got {name!r}"
        )
    cls = known[name]
    if issubclass(cls, PromptLearningConfig) or name == "ADALORA":
        why = "has a loss of its own" if name == "ADALORA" else "puts tokens before the picture"
        raise ConfigError(
            f"adapter.peft_type: {name} {why}, which training on answers does not know; use another method"
        )
    if "target_modules" in {f.name for f in fields(cls)}:
        values.setdefault("target_modules", VISION_LANGUAGE_REGEX)
    if name == "XLORA" and isinstance(values.get("adapters"), dict):  # PEFT finds them only under these names
        values["adapters"] = {str(i): path for i, path in enumerate(values["adapters"].values())}
    return cls, values
