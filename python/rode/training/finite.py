"""No optimizer step from a loss or a gradient that is not finite."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rode.processes import of_all_processes
from rode.training.checkpoints import latest_checkpoint


class NotFiniteError(FloatingPointError):
    """A step whose loss or gradient norm is not finite. The message names the step and the records of its batch."""


class StepGuard:
    """Watches the losses and the gradient norm of each optimizer step.

    Args:
        output_dir: where the run's checkpoints are, of which the message names the last.
    """

    def __init__(self, output_dir: str | os.PathLike[str]) -> None:
        self.output_dir = output_dir
        self._batches: list[tuple[Tensor, list[str]]] = []

    def add(self, loss: Tensor, ids: Sequence[str]) -> None:
        """Take down one micro-batch: its loss, and the ids of its records."""
        self._batches.append((loss.detach(), list(ids)))

    def check(self, norm: Tensor | float, step: int, processes: int = 1) -> None:
        """To be called between the last backward pass of a step and the optimizer, by every process.

        It waits for the device once.

        Args:
            norm: of the gradients, after they were added up over processes.
            step: its number, for the message.
            processes: how many train.

        Raises:
            NotFiniteError: on every process, where the norm or a loss of any process is not finite.
        """
        batches, self._batches = self._batches, []
        losses = torch.stack([loss.float() for loss, _ in batches])
        if isinstance(norm, DTensor):  # FSDP's, of which each process holds its share
            norm = norm.full_tensor()
        norm = torch.as_tensor(norm, device=losses.device)
        bad = ~(losses.isfinite().all() & norm.isfinite().all())
        if processes > 1:  # a loss is of one process alone
            bad = bad.to(torch.int32)
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        if not bad:
            return
        seen = [(float(loss), ids) for loss, (_, ids) in zip(losses, batches, strict=True)]
        if processes > 1:
            parts: list[list[tuple[float, list[str]]]] = [[] for _ in range(processes)]
            torch.distributed.all_gather_object(parts, seen)
            seen = [batch for part in parts for batch in part]
        raise of_all_processes(NotFiniteError(self._message(float(norm), step, seen)))

    def _message(self, norm: float, step: int, seen: list[tuple[float, list[str]]]) -> str:
        wrong = [(loss, ids) for loss, ids in seen if not math.isfinite(loss)]
        what = f"the loss is {wrong[0][0]}" if wrong else f"the gradient norm is {norm}"
        ids = ", ".join(dict.fromkeys(name for _, batch in wrong or seen for name in batch))
        last: Path | None = latest_checkpoint(self.output_dir)
        good = "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
        return (
            f"step {step}: {what} on the records {ids}; training has stopped before this step changed any weight, and {good}: look "
            "at these records, or lower training.learning_rate"
        )
