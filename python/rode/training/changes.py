"""A config that has changed since a run began: what may change is named, and what may not is refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rode.processes import is_main, of_all_processes
from rode.training.config import ConfigError, Experiment, saved_config, with_new_names
from rode_food.settings import build, read_mapping

logger = logging.getLogger(__name__)
_MAY_CHANGE = re.compile(
    r"name|output_dir|evaluation\..*|data\.on_bad_record|data\.sources\.\d+\.(path|name)"
    r"|model\.(path|projector|device|vision_features|features_dir|clusters)"
    r"|training\.(max_steps|epochs|devices|workers|save_steps|save_total_limit|logging_steps|gate_statistics|max_minutes"
    r"|on_nonfinite|max_nonfinite)"
)
"""Keys that a run may go on with other values of: how long it runs, what it keeps and says, and where things lie."""
_NOT_SAID = re.compile(r"name|output_dir|evaluation\..*")
"""Keys among them that change nothing in training."""


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items or not value:
        yield key, value
    for name, item in items:
        yield from _flat(item, f"{key}.{name}" if key else str(name))


def _written_out(values: dict[str, Any]) -> dict[str, Any]:
    """A config as it would be written today: keys that came later at their defaults."""
    try:
        return asdict(build(Experiment, with_new_names(values, say=False)))
    except ConfigError:  # keys that are no more
        return values


def check_changes(experiment: Experiment, checkpoint: Path) -> None:
    """Compare a config with the one that the run of a checkpoint left beside it, if it did.

    Raises:
        ConfigError: a key has another value that cannot come into effect any more; on every process.
    """
    file = saved_config(checkpoint.parent)
    if file is None:
        return
    before, now = dict(_flat(_written_out(read_mapping(file)))), dict(_flat(asdict(experiment)))
    changed = {
        key: (before.get(key), now.get(key))
        for key in {**before, **now}
        # a key that is in one alone is another version's, except within lists and mappings
        if before.get(key) != now.get(key)
        and ((key in before and key in now) or key.startswith(("adapter.", "data.sources.")))
    }
    refused = {key: values for key, values in changed.items() if not _MAY_CHANGE.fullmatch(key)}
    if refused:
        key, (old, new) = next(iter(refused.items()))
        more = f" (and {len(refused) - 1} more: {', '.join(list(refused)[1:])})" if len(refused) > 1 else ""
        raise of_all_processes(
            ConfigError(
                f"{key}: expected {old!r}, with which this run began, got {new!r}{more}; put it back to go on, or set another "
                "output_dir for a new run"
            )
        )
    for key, (old, new) in changed.items():
        if is_main() and not _NOT_SAID.fullmatch(key):
            logger.warning("%s is %r from here on; until %s it was %r", key, new, checkpoint.name, old)
