"""Where a run of several processes begins: the main one looks, and all hear the same."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rode.processes import of_all_processes
from rode.training.checkpoints import Sharding, starting_point
from rode.training.ready import check_writable

if TYPE_CHECKING:
    from transformers import TrainingArguments


def agreed_start(
    run_dir: Path, resume: bool | str | os.PathLike[str], arguments: TrainingArguments, sharding: Sharding
) -> Path | None:
    """`rode.training.checkpoints.starting_point` for all processes of a run, in a folder that can be written.

    Args:
        run_dir, resume, sharding: as there.
        arguments: transformers' TrainingArguments, which have set up torch.distributed.

    Raises:
        OSError, ValueError: as there, on every process.
    """
    found: list[Path | OSError | ValueError | None] = [None]
    if arguments.process_index == 0:
        try:
            check_writable(run_dir)
            found = [starting_point(run_dir, resume, arguments.world_size, sharding)]
        except (OSError, ValueError) as error:
            if arguments.world_size == 1:
                raise
            found = [error]
    if arguments.world_size > 1:
        import torch

        torch.distributed.broadcast_object_list(found, src=0)
    start = found[0]
    if isinstance(start, (OSError, ValueError)):
        raise of_all_processes(start)
    return start
