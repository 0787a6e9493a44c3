"""Training that ends early with a checkpoint."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""Ctrl-C; a scheduler's and a shutdown's request; a closed terminal; Slurm's warning (`sbatch --signal=USR1@120`)."""


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C (or another of `SIGNALS`) ends training after the optimizer step under way, with a checkpoint, and so does
    the end of the time that it may take. A second Ctrl-C or SIGTERM stops at once. Use as a context manager around `train`.

    Args:
        max_minutes: from now; None for no limit.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.asked = False
        self._end = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        at_once = number in (signal.SIGINT, signal.SIGTERM)
        if self.asked and at_once:
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            logger.warning("stopping after this step, with a checkpoint; Ctrl-C once more to stop at once")

    def __enter__(self) -> StopOnInterrupt:
        for name in SIGNALS:
            number = getattr(signal, name, None)  # Windows lacks some
            if number is None or (
                name == "SIGHUP" and signal.getsignal(number) is signal.SIG_IGN
            ):  # by nohup
                continue
            try:
                self._before[number] = signal.signal(number, self._handle)
            except ValueError:  # not in the main thread: whoever runs us there keeps the signals
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not self.asked and self._end is not None and time.monotonic() >= self._end:
            self.asked = True
            logger.warning("training.max_minutes are over: stopping after this step, with a checkpoint")
        asked = torch.tensor(self.asked, device=args.device, dtype=torch.int32)
        if args.world_size > 1:  # all processes stop at the same step, or the others would wait for ever
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if self.asked or (args.world_size > 1 and bool(asked)):
            self.asked = control.should_save = control.should_training_stop = True
