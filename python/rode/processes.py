"""Several processes of one run, as torchrun starts them."""

from __future__ import annotations

import os
from typing import TypeVar

E = TypeVar("E", bound=BaseException)


def is_main() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def of_all_processes(error: E) -> E:
    """Mark an error that every process raises with the same words: the main one alone tells it."""
    error.of_all_processes = True  # type: ignore[attr-defined]
    return error


def tells(error: BaseException) -> bool:
    """Whether this process is to tell the error."""
    return is_main() or not getattr(error, "of_all_processes", False)


def leave_process_group() -> None:
    """End this process's part in torch.distributed, once all others are as far: an exit with threads at work may abort."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
