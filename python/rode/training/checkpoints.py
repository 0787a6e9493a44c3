"""Checkpoints of a run: which are whole, and where a run goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"  # Trainer writes it last
Sharding = Literal["ddp", "fsdp", "deepspeed"]
_WORDS: dict[Sharding, str] = {
    "ddp": "neither training.fsdp nor training.deepspeed",
    "fsdp": "training.fsdp",
    "deepspeed": "training.deepspeed",
}


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Trainer's state in a checkpoint; None where it is missing or was cut short while it was written."""
    try:
        state = json.loads((checkpoint / STATE).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return state if isinstance(state, dict) else None


def _newest_first(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Every checkpoint-N that holds a state, whole or torn."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(directory).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and (path / STATE).is_file()
    ]
    return (path for _, path in sorted(found, reverse=True))


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The checkpoint-N with the largest N that was written whole, or None."""
    return next((path for path in _newest_first(directory) if read_state(path) is not None), None)


def starting_point(
    run_dir: Path,
    resume: bool | str | os.PathLike[str],
    processes: int = 1,
    sharding: Sharding = "ddp",
    *,
    say: bool = True,
) -> Path | None:
    """The checkpoint that a run goes on from, with everything that a run to the bit needs; None for a new run.

    Args:
        run_dir: the run's folder.
        resume: True for the latest whole checkpoint in it, a checkpoint's path, or False for a new run.
        processes: number of processes that train.
        sharding: how they share weights and optimizer, see `rode.training.sharding`; each kind saves in its own way.
        say: log which torn checkpoints are passed over.

    Raises:
        FileExistsError: a new run, and `run_dir` holds a checkpoint.
        FileNotFoundError: no checkpoint, or one of its files is missing.
        ValueError: the checkpoint named is torn, or is of another number of processes or another kind of sharding.
    """
    if isinstance(resume, bool):
        latest = latest_checkpoint(run_dir)
        if not resume:
            if latest is not None:
                raise FileExistsError(
                    f"{run_dir} holds {latest.name}: pass --resume, or set another output_dir"
                )
            return None
        torn = [path for path in _newest_first(run_dir) if read_state(path) is None]
        if latest is None and torn:
            raise FileNotFoundError(
                f"{torn[0] / STATE} was cut short while it was written, and {run_dir} holds no whole checkpoint to resume from; "
                "leave --resume out to train anew"
            )
        if latest is None:
            raise FileNotFoundError(f"{run_dir}: no checkpoint to resume from; leave --resume out")
        for path in torn:
            if say and int(path.name.removeprefix("checkpoint-")) > int(
                latest.name.removeprefix("checkpoint-")
            ):
                logger.warning(
                    "%s was cut short while it was written: going on from %s", path / STATE, latest.name
                )
    else:
        latest = Path(resume)
        if not (latest / STATE).is_file():
            raise FileNotFoundError(f"{resume}: no checkpoint ({STATE} is missing)")
        if read_state(latest) is None:
            raise ValueError(
                f"{latest / STATE} was cut short while it was written; resume from another checkpoint"
            )
    _check_files(latest, processes, sharding)
    return latest


def _optimizer_files(checkpoint: Path, processes: int) -> dict[Sharding, list[str]]:
    """The files that hold the optimizer, by the kind of sharding that leaves them."""
    try:
        step = (checkpoint / "latest").read_text().strip()  # DeepSpeed's name for its own folder
    except FileNotFoundError:
        step = "global_step*"
    ranks = range(processes)
    return {
        "ddp": ["optimizer.pt"],
        "fsdp": ["optimizer.bin", "pytorch_model_fsdp.bin"],
        "deepspeed": [
            "latest",
            *(f"{step}/*zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in ranks),
        ],
    }


def _check_files(checkpoint: Path, processes: int, sharding: Sharding) -> None:
    """Trainer goes on without these, silently and with other results."""
    random = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    there = {path.name for path in checkpoint.glob("rng_state*.pth")}
    if there and not there & set(random):
        raise ValueError(
            f"{checkpoint}: {random[0]} is missing, as the checkpoint is of {_count(there)} and this run has {processes}; start it "
            "with as many"
        )
    optimizer = _optimizer_files(checkpoint, processes)
    for kind, names in optimizer.items():
        if (
            kind != sharding
            and any(checkpoint.glob(names[0]))
            and not any(checkpoint.glob(optimizer[sharding][0]))
        ):
            raise ValueError(
                f"{checkpoint}: the checkpoint is of a run with {_WORDS[kind]} and this run has {_WORDS[sharding]}; start it in "
                "the same way"
            )
    for name in (*optimizer[sharding], "scheduler.pt", *random):
        if not any(checkpoint.glob(name)):
            raise FileNotFoundError(
                f"{checkpoint / name} is missing, and without it training would go on with other results; resume from another "
                "checkpoint (--resume CHECKPOINT)"
            )
    if processes > 1 and f"rng_state_{processes}.pth" in there:
        raise ValueError(
            f"{checkpoint}: the checkpoint is of {_count(there)} and this run has {processes}; start it with as many"
        )


def _count(random: set[str]) -> str:
    """The number of processes that wrote these files of random state."""
    ranks = len(random - {"rng_state.pth"})
    return f"{ranks} processes" if ranks else "one process"
