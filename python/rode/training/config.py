"""The config of an experiment: one YAML file, checked field by field when it is read.

Paths in a config are relative to the working directory; `~` and `$VARIABLES` are expanded. `extends: other.yaml`, relative to
the file that names it, is merged below it: mappings key by key, all else (and `adapter`, whose fields for one method
another may refuse) as a whole. A file with a `sweep` (`rode.training.sweep`) holds several experiments; `sweep=NAME` chooses one.
"""

from __future__ import annotations

import functools
import logging
import typing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rode.training import sweep
from rode.training.adapters import adapter_config
from rode.training.checks import check
from rode.training.experiment import (
    ALL_TASKS,
    ConfigError,
    DataConfig,
    EvaluationConfig,
    Experiment,
    ModelConfig,
    SourceConfig,
    TrainingConfig,
)
from rode_food.settings import build, override, read_mapping

__all__ = [
    "ALL_TASKS",
    "ConfigError",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "ModelConfig",
    "SourceConfig",
    "TrainingConfig",
    "adapter_config",
    "dump_experiment",
    "experiment_from_dict",
    "experiment_values",
    "load_experiment",
    "saved_config",
    "with_new_names",
]
logger = logging.getLogger(__name__)

_OLD_NAMES = {"on_bad_image": "on_bad_record"}
"""Former names of keys of `data`, which are still read."""


@functools.cache
def _warn_once(old: str, new: str) -> None:
    logger.warning("data.%s is called data.%s now; the old name is read still", old, new)


def with_new_names(values: dict[str, Any], say: bool = True) -> dict[str, Any]:
    """The values with former names of keys replaced, with a warning if `say`. An old name beside the new one was given later,
    so it counts."""
    data = values.get("data")
    if not isinstance(data, dict) or not _OLD_NAMES.keys() & data.keys():
        return values
    data = dict(data)
    for old, new in _OLD_NAMES.items():
        if old in data:
            if say:
                _warn_once(old, new)
            data[new] = data.pop(old)
    return {**values, "data": data}


def experiment_from_dict(values: dict[str, Any]) -> Experiment:
    """A config from plain values, checked. Raises ConfigError."""
    values = with_new_names(values)
    experiment = build(Experiment, values)
    check(experiment)
    return experiment


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if both and key != "adapter" else value
    return out


def experiment_values(path: str | Path, *, base: str | Path | None = None) -> dict[str, Any]:
    """The plain values of a config file with those of the file that it extends below them, unchecked.

    Args:
        path: the YAML file.
        base: stands in for what the file's `extends` names, whether it has one or not.

    Raises:
        FileNotFoundError; ConfigError for what is not YAML, no mapping, or extends itself.
    """
    chain: list[dict[str, Any]] = []
    seen: list[Path] = []
    following: Path | None = Path(path)
    while following is not None:
        file = following
        if not file.is_file():
            named = f", which {seen[-1]} extends" if seen else ""
            raise FileNotFoundError(f"{file}: no such config{named}")
        if any(file.samefile(other) for other in seen):
            raise ConfigError(f"{path}: extends: expected an end, got {' -> '.join(map(str, [*seen, file]))}")
        seen.append(file)
        values = read_mapping(file)
        parent = values.pop("extends", None)
        if not isinstance(parent, str | None):
            raise ConfigError(f"{file}: extends: expected the name of a config file, got {parent!r}")
        chain.append(with_new_names(values))
        following = None if parent is None else file.parent / parent
        if base is not None and len(chain) == 1:
            following = Path(base)
    return functools.reduce(_merge, reversed(chain))


def load_experiment(
    path: str | Path, overrides: typing.Sequence[str] = (), *, base: str | Path | None = None
) -> Experiment:
    """Read a config file and what it extends.

    Args:
        path: the YAML file.
        overrides: "training.max_steps=20", "data.sources.0.path=my.jsonl": values as YAML. "sweep=NAME" chooses a variant.
        base: see `experiment_values`.

    Raises:
        FileNotFoundError; ConfigError for unknown keys, wrong types and impossible values.
    """
    values = experiment_values(path, base=base)
    choice = f"{sweep.KEY}="
    chosen = [text.removeprefix(choice) for text in overrides if text.startswith(choice)]
    try:
        values = sweep.choose(values, chosen[-1] if chosen else None)
        for assignment in overrides:
            if not assignment.startswith(choice):
                override(values, assignment)
        return experiment_from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def saved_config(folder: Path) -> Path | None:
    """The config file that `rode train` left in a run's folder, or None. Older runs left it as recipe.yaml."""
    return next((file for name in ("config.yaml", "recipe.yaml") if (file := folder / name).is_file()), None)


def dump_experiment(experiment: Experiment) -> str:
    """YAML that `load_experiment` reads back to an equal config; what it extends is written out."""
    return yaml.safe_dump(asdict(experiment), sort_keys=False, allow_unicode=True)
