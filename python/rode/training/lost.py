"""A run that goes on in fewer processes than it began with: all of them end, and say why."""

from __future__ import annotations

import re
from pathlib import Path

from torch.distributed import DistError

from rode.training.checkpoints import latest_checkpoint

_BACKENDS = re.compile(r"\b(gloo|nccl|ProcessGroup\w*|process group)\b", re.IGNORECASE)


class LostProcessError(ConnectionError):
    """Another process of the run has ended, or cannot be reached. The message names where the run can go on from."""


def is_lost_process(error: RuntimeError) -> bool:
    """Whether torch.distributed raised it: gloo's errors have no class of their own."""
    return isinstance(error, DistError) or bool(_BACKENDS.search(str(error)))


def lost_process(run_dir: Path, rank: int) -> LostProcessError:
    """The error for this process, to be raised from torch's own."""
    last = latest_checkpoint(run_dir)
    on = "start the run anew: there is no checkpoint yet" if last is None else f"go on with --resume ({last})"
    return LostProcessError(
        f"process {rank} of this run has lost another one, which ended or cannot be reached (the launcher's report names the first "
        f"that failed, and its own output says why); then {on}"
    )
