"""TensorBoard's logs, which may fail without an end to the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

logger = logging.getLogger(__name__)


class Board(TrainerCallback):
    """Writes the log to TensorBoard's files. The first failure is a warning, and nothing is written after it.

    Args:
        directory: of the files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._callback: TensorBoardCallback | None = None
        self._writer: Any = None

    def open(self) -> None:
        """Make the files."""
        from torch.utils.tensorboard import SummaryWriter

        def make() -> None:
            self._writer = SummaryWriter(str(self._directory))
            self._callback = TensorBoardCallback(self._writer)

        self._try(make)

    def close(self) -> None:
        """Write what is left."""
        if self._callback is not None:
            self._try(self._writer.close)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (callback := self._callback) is not None:
            self._try(lambda: callback.on_train_begin(args, state, control, **kwargs))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (callback := self._callback) is not None:
            self._try(lambda: callback.on_log(args, state, control, **kwargs))

    def _try(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except Exception as error:
            self._callback = None
            logger.warning(
                "%s: TensorBoard's log ends here (%s: %s); training goes on, and history.json holds the same values",
                self._directory,
                type(error).__name__,
                error,
            )


@contextmanager
def quiet_writer_threads() -> Iterator[None]:
    """Keep tracebacks of TensorBoard's own thread off the terminal: `Board` hears of its error at the next write."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
