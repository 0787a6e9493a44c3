"""Training that ends early with a checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends training after the optimizer step under way, with a checkpoint; the second
    stops at once. Use as a context manager around `train`."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("stopping after this step, with a checkpoint; once more to stop at once")

    def __enter__(self) -> StopOnInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
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
        asked = torch.tensor(self.asked, device=args.device, dtype=torch.int32)
        if args.world_size > 1:  # all processes stop at the same step, or the others would wait for ever
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        if self.asked or (args.world_size > 1 and bool(asked)):
            self.asked = control.should_save = control.should_training_stop = True
