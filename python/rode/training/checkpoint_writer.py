"""Checkpoints that are whole or not there: written aside, with a manifest, and renamed once every process has written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from rode.training.checkpoints import is_whole, newest_first
from rode.training.disk import names_full_disk
from rode.training.finite import check_weights
from rode.training.manifest import write_manifest
from rode_food.atomic import sync

ASIDE = ".unfinished"
"""A folder in the run's, with whatever is being written or removed; what a killed run left there goes at the next write."""


def publish(written: Path, checkpoint: Path) -> None:
    """Give a written folder its manifest and its name.

    Args:
        written: a folder in `ASIDE`.
        checkpoint: its name; what has it already is replaced.
    """
    write_manifest(written)
    sync(written)
    _remove(checkpoint, written.parent)
    os.replace(written, checkpoint)


def rotate(run_dir: Path, newest: Path, limit: int | None) -> None:
    """Remove checkpoints that are older than the latest `limit` whole ones; damaged ones do not count.

    Args:
        run_dir: the run's folder.
        newest: the one just written, which stays; those with larger numbers are of another time, and are let be.
        limit: 0 and None keep all.
    """
    if not limit or limit < 0:
        return
    step = _number(newest)
    whole = 0
    for path in [path for path in newest_first(run_dir) if _number(path) <= step]:
        if whole >= limit:
            _remove(path, run_dir / ASIDE)
        elif is_whole(path):
            whole += 1


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _remove(checkpoint: Path, aside: Path) -> None:
    """Remove a checkpoint. A kill in between leaves no half of one under its name."""
    if not checkpoint.exists():
        return
    aside.mkdir(exist_ok=True)
    gone = aside / f"removed-{checkpoint.name}"
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(checkpoint, gone)
    shutil.rmtree(gone)


class WholeCheckpoints(Trainer):
    """Trainer that writes its checkpoints with `publish` and removes old ones with `rotate`, afterwards."""

    _writes_aside = False

    @property
    def run_dir(self) -> Path:
        return Path(self.args.output_dir or ".")

    def check_weights(self) -> None:
        """Raises NotFiniteError where a trained weight is not finite."""
        assert self.model is not None, "made with a model"
        check_weights(self.model, self.run_dir, self.args.world_size)

    def _get_output_dir(self, trial: Any) -> str:
        directory = str(super()._get_output_dir(trial))
        return os.path.join(directory, ASIDE) if self._writes_aside else directory

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        self.check_weights()
        aside, checkpoint = run_dir / ASIDE, run_dir / f"checkpoint-{self.state.global_step}"
        if self.is_world_process_zero():
            shutil.rmtree(aside, ignore_errors=True)
        self._wait()
        self._writes_aside = True
        try:
            with names_full_disk(run_dir):
                super()._save_checkpoint(model, trial)
                self._wait()  # the manifest is of what all of them have written
                if self.is_world_process_zero():
                    publish(aside / checkpoint.name, checkpoint)
                    rotate(run_dir, checkpoint, self.args.save_total_limit)
        finally:
            self._writes_aside = False
            if self.is_world_process_zero():
                shutil.rmtree(aside, ignore_errors=True)
        self._wait()  # until then it has no name

    def _wait(self) -> None:
        """Wait for all processes."""
        if self.args.world_size > 1:
            torch.distributed.barrier()
