"""Checks of what a run needs, before a record or a model is read: files, device, and a folder that can be written."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rode.processes import is_main, of_all_processes
from rode.vlm.load import PROJECTOR_FILE, pick_device
from rode_food.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rode.training.config import Experiment

logger = logging.getLogger(__name__)


def check_inputs(experiment: Experiment, *, model: bool = True, data: bool = True) -> None:
    """Find what a config names and is not there, every process by itself.

    Args:
        experiment: the config.
        model: whether the config's model is used. data: likewise.

    Raises:
        FileNotFoundError, ValueError: names the key; on every process.
    """
    try:
        _check_inputs(experiment, model, data)
    except (OSError, ValueError) as error:
        raise of_all_processes(error) from error.__cause__


def _check_inputs(experiment: Experiment, model: bool, data: bool) -> None:
    settings = experiment.model
    if model:
        path = os.path.expanduser(settings.path)
        if not os.path.isdir(path) and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path):
            raise FileNotFoundError(
                f"model.path: {path}: no such model directory (nor a hub name like owner/name)"
            )
        if settings.projector is not None:
            _find("model.projector", settings.projector, PROJECTOR_FILE)
        try:
            pick_device(settings.device)
        except ValueError as error:
            raise ValueError(f"model.{error}") from error
    if settings.clusters is not None:
        _find("model.clusters", settings.clusters)
    if data:
        for i, source in enumerate(experiment.data.sources):
            if source.weight != 0:
                _find(f"data.sources[{i}].path", source.path)
    vocabulary = experiment.evaluation.vocabulary
    if vocabulary is not None:  # it is read after the training, perhaps hours later
        try:
            Vocabulary.load(vocabulary)
        except FileNotFoundError:
            if is_main():
                logger.warning(
                    "evaluation.vocabulary: %s: no such file yet; evaluation will want it", vocabulary
                )
        except ValueError as error:
            raise ValueError(f"evaluation.vocabulary: {error}") from error


def _find(key: str, path: str, within: str | None = None) -> None:
    """Raises FileNotFoundError, unless a file or a folder (with a file of the name `within`) is there."""
    there = Path(path).expanduser()
    if within is not None and there.is_dir():
        there /= within
    if not there.exists():
        raise FileNotFoundError(f"{key}: {there}: no such file or folder")


def check_writable(run_dir: Path) -> None:
    """Raises OSError, naming the key, where no file can be made in a run's folder."""
    probe = run_dir / f".probe-{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(
            f"output_dir: {run_dir}: no file can be written there ({why}); set another output_dir"
        ) from error
