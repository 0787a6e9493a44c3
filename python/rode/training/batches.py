"""Batches for training. One that cannot be made comes as its error, so that the step it belongs to can say so and end the run."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch.utils.data import get_worker_info

from rode_food.retry import retried

FAILED = "failed"
"""Key of a batch that is a `FailedBatch` and nothing else."""


@dataclass
class FailedBatch:
    """A batch that could not be made.

    Attributes:
        error: why. ids: of its records, as far as they were read.
    """

    error: Exception
    ids: list[str] = field(default_factory=list)


class WorkerTraceback(Exception):
    """The traceback of an error in a data-loader worker, as its cause: the error itself comes without one."""


class Batches:
    """Collator of item numbers: takes the items and makes their batch.

    Args:
        items: examples or packs of them; each is read when its batch is made, a second time if the first read fails.
        collate: makes a batch of them (`rode.vlm.TrainingCollator`).
    """

    def __init__(self, items: Sequence[Any], collate: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.items, self.collate = items, collate

    def __call__(self, numbers: Sequence[int]) -> dict[str, Any]:
        ids: list[str] = []
        try:
            items = []
            for number in numbers:
                items.append(retried(partial(self.items.__getitem__, number)))
                pack = items[-1] if isinstance(items[-1], tuple) else items[-1:]
                ids += [example.record_id for example in pack]
            return self.collate(items)
        except Exception as error:
            return {FAILED: FailedBatch(portable(error), ids)}


def portable(error: Exception) -> Exception:
    """The error as another process can raise it; in a data-loader worker with its traceback as a text."""
    in_worker = get_worker_info() is not None
    text = "".join(traceback.format_exception(error)) if in_worker else ""
    try:
        there = pickle.loads(pickle.dumps(error))
        whole = type(there) is type(error) and str(there) == str(error)
    except Exception:
        whole = False
    if not whole:
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    if in_worker:
        error.worker_traceback = text  # type: ignore[attr-defined]
    return error


def raise_failed(batch: FailedBatch) -> None:
    """Raise the error of a batch."""
    if (text := getattr(batch.error, "worker_traceback", None)) is not None:
        raise batch.error from WorkerTraceback(f"\n{text}")
    raise batch.error
