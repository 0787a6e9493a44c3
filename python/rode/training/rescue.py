"""A step that fails leaves a checkpoint of the last whole step, and its error names step and records."""

from __future__ import annotations

import logging
import random
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from rode.processes import of_all_processes
from rode.training.batches import FAILED, FailedBatch, portable, raise_failed
from rode.training.checkpoint_writer import WholeCheckpoints
from rode.training.checkpoints import latest_checkpoint
from rode.training.disk import DiskFullError
from rode.training.finite import NotFiniteError

logger = logging.getLogger(__name__)


class RandomState(NamedTuple):
    """State of all random numbers of a process."""

    python: Any
    numpy: Any
    cpu: Tensor
    gpus: list[Tensor]

    @classmethod
    def now(cls) -> RandomState:
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpus)

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)


class _Steps(TrainerCallback):
    """Tells a trainer where a step's change of weights begins, and where the step is whole."""

    def __init__(self, trainer: KeepsLastStep) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.changing = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.changing, self.trainer.ids = False, []
        self.trainer.after_step = (RandomState.now(), self.trainer.counted())


class KeepsLastStep(WholeCheckpoints):
    """Trainer whose `train` saves the last whole step before an error of a later one leaves it.

    With several processes that is so for batches that cannot be made, of which all processes hear. Elsewhere they wait for each
    other inside of the step, and cannot save.

    Attributes:
        changing: the optimizer is at work, so that weights and its memory are of no whole step.
        after_step: random state and counts (`counted`) after the last whole step of this process; None before there is one.
        ids: records of the batch under way.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.changing, self._agreed = False, False
        self.after_step: tuple[RandomState, Any] | None = None
        self.ids: list[str] = []
        self._saved: int | None = None
        self.add_callback(_Steps(self))

    def counted(self) -> Any:
        """Sums over the steps so far, which go into a checkpoint."""
        return None

    def recount(self, counted: Any) -> None:
        """Take back what `counted` gave."""

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        except (NotFiniteError, DiskFullError):  # they say themselves from where to go on
            raise
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):  # what the failed step holds is in the way
                traceback.clear_frames(error.__traceback__)
            step, ids = self.state.global_step, ", ".join(dict.fromkeys(self.ids))
            at = f"in step {step + 1}, on the records {ids}" if ids else f"after step {step}"
            self._leave_checkpoint()
            last = latest_checkpoint(self.run_dir)
            then = (
                "start the run anew: there is no checkpoint"
                if last is None
                else f"go on with --resume ({last})"
            )
            error.add_note(f"this was {at}; {then}")
            raise

    def _leave_checkpoint(self) -> None:
        """Save the last whole step, where there is one that is not saved yet and can be."""
        alone = self.args.world_size > 1 and not self._agreed
        if self.after_step is None or self.changing or alone or self._saved == self.state.global_step:
            return
        assert self.model is not None, "made with a model"
        for parameter in self.model.parameters():
            parameter.grad = None
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        state, counted = self.after_step
        try:
            state.restore()
            self.recount(counted)
            self._save_checkpoint(self.model_wrapped, None)
        except Exception as error:
            logger.warning(
                "step %d could not be saved after the error of the next one: %s",
                self.state.global_step,
                error,
            )

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self._saved = self.state.global_step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        batches: list[Any] = []
        failed: FailedBatch | None = None
        try:
            for batch in (next(epoch_iterator, None) for _ in range(num_batches)):
                if batch is None:
                    break
                batches.append(batch)
        except Exception as error:  # a worker was killed
            failed = FailedBatch(error)
        failed = next((batch[FAILED] for batch in batches if FAILED in batch), failed)
        if self.args.world_size > 1:
            failed = self._any_failed(failed)
        if failed is not None:
            self.ids = failed.ids
            raise_failed(failed)
        return super().get_batch_samples(iter(batches), num_batches, device)

    def _any_failed(self, own: FailedBatch | None) -> FailedBatch | None:
        """The first process's batch that failed, for all of them."""
        any_failed = torch.tensor(own is not None, device=self.args.device, dtype=torch.int32)
        torch.distributed.all_reduce(any_failed, op=torch.distributed.ReduceOp.MAX)
        if not any_failed:
            return None
        found: list[FailedBatch | None] = [None] * self.args.world_size
        torch.distributed.all_gather_object(found, own and FailedBatch(portable(own.error), own.ids))
        self._agreed = True
        first = next(batch for batch in found if batch is not None)
        return FailedBatch(of_all_processes(first.error), first.ids)
