"""Steers the L1 loss on gates to a target share of closed ones, step by step (ReMoE, Wang et al. 2024, Eq. 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from rode.tuner.context import context_of


class HoldSparsity(TrainerCallback, ExportableState):
    """A callback for transformers' Trainer: after each optimizer step the L1 loss's weight is multiplied by `factor` where too few
    gates of the step were closed (RodeConfig.target_sparsity), and divided by it otherwise.

    `rode train` adds it by itself. Its state is saved with checkpoints and taken up again when training resumes.

    Args:
        factor: above 1.
        multiplier: what aux_weight is multiplied by at the start.
    """

    def __init__(self, factor: float = 1.2, multiplier: float = 1.0) -> None:
        if not factor > 1:
            raise ValueError(f"factor: expected a number above 1, got {factor!r}")
        self.factor, self.multiplier = factor, multiplier
        self.sparsity: float | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        callbacks: object = state.stateful_callbacks  # a dict by now, whatever its annotation says
        saved = callbacks.get(type(self).__name__) if isinstance(callbacks, dict) else None
        if state.global_step > 0 and isinstance(saved, dict):
            self.multiplier = saved["args"]["multiplier"]
        context = None if model is None else context_of(model)
        if context is not None:
            context.l1_factor, context.closed, context.gates_seen = self.multiplier, None, None

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        context = None if model is None else context_of(model)
        if context is None or context.closed is None or context.gates_seen is None:
            return
        assert context.target_sparsity is not None, "gates are counted for adapters that have one"
        counts = torch.stack((context.closed, context.gates_seen))
        if args.world_size > 1:
            torch.distributed.all_reduce(counts)
        context.closed = context.gates_seen = None
        self.sparsity = float(counts[0] / counts[1])
        self.multiplier *= self.factor if self.sparsity < context.target_sparsity else 1 / self.factor
        context.l1_factor = self.multiplier

    def scalars(self) -> dict[str, float]:
        """For a training log: the last step's share of closed gates, and the multiplier."""
        if self.sparsity is None:
            return {}
        return {"gates/sparsity": self.sparsity, "gates/l1_multiplier": self.multiplier}

    def state(self) -> dict[str, Any]:
        return {"args": {"factor": self.factor, "multiplier": self.multiplier}, "attributes": {}}
