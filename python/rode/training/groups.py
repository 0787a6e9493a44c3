"""Groups of layers across a run's resumes: kept with each checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rode.tuner.siblings import learned_groups, restore_groups


class LearnedGroups(TrainerCallback, ExportableState):
    """The groups of a model's adapted layers (`rode.tuner.siblings`).

    A group sums the gradients that reach its input in another order than single layers do. A resumed run that had to learn its
    groups anew would differ from one that was never stopped, in the last bits of its first step.
    """

    def __init__(self, model: torch.nn.Module | None = None, groups: dict[str, Any] | None = None) -> None:
        # transformers makes callbacks of what `state` gives as their arguments, `groups` too
        self.model = model

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        callbacks: object = state.stateful_callbacks  # a dict by now, whatever its annotation says
        saved = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        if self.model is not None and state.global_step > 0 and isinstance(saved, dict):
            restore_groups(self.model, saved["args"]["groups"])

    def state(self) -> dict[str, Any]:
        groups = {} if self.model is None else learned_groups(self.model)
        return {"args": {"groups": groups}, "attributes": {}}
