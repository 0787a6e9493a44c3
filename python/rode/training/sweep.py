"""Sweeps: one config file for runs that differ in a few keys.

`sweep` names keys of the config, and for each key the values that it takes, every value under a label:

    name: ranks
    sweep:
      adapter.ranks: {2-4-8-16: [2, 4, 8, 16], 30: [30]}
      data.sources.0.tasks: {"": [ingredients, recipe], recipe: [recipe]}

Each combination is a variant. Its name is the config's name followed by the labels: ranks-2-4-8-16, ranks-2-4-8-16-recipe,
ranks-30, ranks-30-recipe. An empty label adds nothing to the name.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

from rode_food.settings import SettingsError, assign, did_you_mean

KEY = "sweep"


def variants(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The variants of a config's plain values, in order: name -> key -> value. Empty for a config without a sweep.

    Raises:
        SettingsError: the sweep is no mapping of keys to labelled values, or names two variants alike.
    """
    sweep = values.get(KEY, {})
    if not isinstance(sweep, dict):
        raise SettingsError(f"{KEY}: expected a mapping of keys to labelled values, got {sweep!r}")
    for key, labelled in sweep.items():
        if not isinstance(labelled, dict) or not labelled:
            raise SettingsError(f"{KEY}.{key}: expected a mapping of labels to values, got {labelled!r}")
    found: dict[str, dict[str, Any]] = {}
    for choice in itertools.product(*(labelled.items() for labelled in sweep.values())) if sweep else ():
        name = "-".join([str(values.get("name")), *(str(label) for label, _ in choice if label != "")])
        if name in found or Path(name).name != name:
            why = "two variants have this name" if name in found else "a name must be able to name a folder"
            raise SettingsError(f"{KEY}: expected other labels than those of {name!r}: {why}")
        found[name] = {key: value for key, (_, value) in zip(sweep, choice, strict=True)}
    return found


def choose(values: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The plain values of one variant; those of a config without a sweep as they are.

    Args:
        name: of the variant; None where none was asked for.

    Raises:
        SettingsError: no such variant, or none was asked for and there are several.
    """
    found = variants(values)
    if name is None and not found:
        return values
    if name is None:
        raise SettingsError(
            f"{KEY}: expected {KEY}=NAME to choose one of its variants, got none: {', '.join(found)}"
        )
    if name not in found:
        hint = did_you_mean(name, found) if found else "the config has no sweep; leave it out"
        raise SettingsError(f"{KEY}={name}: no such variant; {hint}")
    chosen = copy.deepcopy({key: value for key, value in values.items() if key != KEY})
    chosen["name"] = name
    for key, value in found[name].items():
        assign(chosen, key, copy.deepcopy(value), f"{KEY}.{key}")
    return chosen
