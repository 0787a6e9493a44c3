"""Counts over a whole run, across its resumes: kept with each checkpoint."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState


class RunCounts(TrainerCallback, ExportableState):
    """Sums of the steps before this process began, and those to be saved with the next checkpoint.

    Attributes:
        before: by name; empty for a new run and for checkpoints of older versions.
        total: likewise, up to the checkpoint that is written.
    """

    def __init__(self, total: dict[str, float] | None = None) -> None:
        self.before: dict[str, float] = {}
        self.total = dict(total or {})

    def restore(self, state: TrainerState) -> None:
        """Take the sums from a checkpoint's state."""
        callbacks: object = state.stateful_callbacks  # a dict by now, whatever its annotation says
        saved = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        if state.global_step > 0 and isinstance(saved, dict):
            self.before = dict(saved["args"]["total"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.restore(state)

    def state(self) -> dict[str, Any]:
        return {"args": {"total": self.total}, "attributes": {}}
