"""No optimizer step from a loss or a gradient that is not finite, and no weights saved that are not."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rode.processes import of_all_processes
from rode.training.checkpoints import latest_checkpoint

logger = logging.getLogger(__name__)


class NotFiniteError(FloatingPointError):
    """A step whose loss or gradient norm is not finite. The message names the step and the records of its batch."""


class StepGuard:
    """Watches the losses and the gradient norm of each optimizer step.

    Args:
        output_dir: where the run's checkpoints are, of which the message names the last.
        skips: steps in a row that may be left out; 0 stops at the first.
        explain: takes the inputs of a batch and says which layer is to blame, or None where it finds none.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        skips: int = 0,
        explain: Callable[[Any], str | None] | None = None,
    ) -> None:
        self.output_dir, self.skips, self.explain = output_dir, skips, explain
        self.skipped = self.overflows = 0  # in all
        self._in_a_row = 0
        self._batches: list[tuple[Tensor, list[str], Any]] = []

    def add(self, loss: Tensor, ids: Sequence[str], inputs: Any = None) -> None:
        """Take down one micro-batch: its loss, the ids of its records, and what `explain` takes."""
        self._batches.append((loss.detach(), list(ids), inputs))

    def check(self, norm: Tensor | float, step: int, processes: int = 1, *, scaled: bool = False) -> bool:
        """To be called between the last backward pass of a step and the optimizer, by every process.

        It waits for the device once.

        Args:
            norm: of the gradients, after they were added up over processes.
            step: its number, for the message.
            processes: how many train.
            scaled: the loss was multiplied before its backward pass. A norm that is not finite beside losses that are is an
                overflow then, and the step is left out, however many there are: the factor is halved each time.

        Returns:
            Whether the optimizer may take the step; False leaves it out.

        Raises:
            NotFiniteError: on every process, where the norm or a loss of any process is not finite, and no more may be left out.
        """
        batches, self._batches = self._batches, []
        losses = torch.stack([loss.float() for loss, *_ in batches])
        if isinstance(norm, DTensor):  # FSDP's, of which each process holds its share
            norm = norm.full_tensor()
        norm = torch.as_tensor(norm, device=losses.device)
        if not _any_process(~(losses.isfinite().all() & norm.isfinite().all()), processes):
            self._in_a_row = 0
            return True
        if scaled and not _any_process(~losses.isfinite().all(), processes):
            self.overflows += 1
            logger.info("step %d: the scaled loss's gradient overflows; this step is left out", step)
            return False
        seen = [(float(loss), ids) for loss, (_, ids, _) in zip(losses, batches, strict=True)]
        stops = self._in_a_row >= self.skips
        blame = self._blame(seen, [inputs for *_, inputs in batches]) if stops else None
        if processes > 1:
            parts: list[tuple[list[tuple[float, list[str]]], str | None]] = [([], None)] * processes
            torch.distributed.all_gather_object(parts, (seen, blame))
            seen = [batch for part, _ in parts for batch in part]
            blame = next((text for _, text in parts if text is not None), None)
        what = self._what(float(norm), step, seen)
        if stops:
            raise of_all_processes(NotFiniteError(self._message(what, blame)))
        self.skipped += 1
        self._in_a_row += 1
        logger.warning(
            "%s; this step is left out (%d in a row, %d in all)", what, self._in_a_row, self.skipped
        )
        return False

    def _blame(self, seen: list[tuple[float, list[str]]], inputs: list[Any]) -> str | None:
        if self.explain is None:
            return None
        wrong = [given for (loss, _), given in zip(seen, inputs, strict=True) if not math.isfinite(loss)]
        return next(filter(None, map(self.explain, wrong or inputs)), None)

    def _what(self, norm: float, step: int, seen: list[tuple[float, list[str]]]) -> str:
        wrong = [(loss, ids) for loss, ids in seen if not math.isfinite(loss)]
        what = f"the loss is {wrong[0][0]}" if wrong else f"the gradient norm is {norm}"
        ids = ", ".join(dict.fromkeys(name for _, batch in wrong or seen for name in batch))
        return f"step {step}: {what} on the records {ids}"

    def _message(self, what: str, blame: str | None) -> str:
        row = f" {self._in_a_row} steps in a row have been left out before it;" if self._in_a_row else ""
        layer = "" if blame is None else f" {blame};"
        return (
            f"{what};{row}{layer} training has stopped before this step changed any weight, and {_last(self.output_dir)}: look "
            "at these records, or lower training.learning_rate"
        )


def check_weights(model: nn.Module, output_dir: str | os.PathLike[str], processes: int = 1) -> None:
    """To be called before trained weights are saved, by every process: finite gradients can lead to weights that are not.

    Raises:
        NotFiniteError: on every process, where a trained weight of any process is not finite.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    local = [(name, p.to_local() if isinstance(p, DTensor) else p) for name, p in trained]
    finite = [tensor.detach().isfinite().all() for _, tensor in local]
    if not finite or not _any_process(~torch.stack(finite).all(), processes):
        return
    bad = next((name for (name, _), good in zip(local, finite, strict=True) if not good), None)
    which = "another process's weights" if bad is None else f"the weight {bad}"
    raise NotFiniteError(
        f"{which} had values that are not finite when they were to be saved; nothing was saved, and {_last(output_dir)}: lower "
        "training.learning_rate"
    )


def _any_process(bad: Tensor, processes: int) -> bool:
    if processes > 1:  # a loss is of one process alone
        bad = bad.to(torch.int32)
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return bool(bad)


def _last(output_dir: str | os.PathLike[str]) -> str:
    last: Path | None = latest_checkpoint(output_dir)
    return "there is no checkpoint yet" if last is None else f"the last good checkpoint is {last}"
