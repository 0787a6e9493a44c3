"""Checkpoints of a run: which are whole, and where a run goes on."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rode.training.manifest import MANIFEST, damage

logger = logging.getLogger(__name__)
STATE = "trainer_state.json"  # Trainer writes it last
AUTO = "auto"
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


def newest_first(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Every checkpoint-N, whole or not."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in Path(directory).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdigit() and path.is_dir()
    ]
    return (path for _, path in sorted(found, reverse=True))


def is_whole(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are there in the size in which they were written. Reads none but small ones."""
    return _problem(checkpoint, contents=False) is None


def _problem(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why a checkpoint is not whole, in words, or None.

    One without a manifest is of an older version; its state was written last, and all that can be asked is whether that is whole.
    """
    if (checkpoint / MANIFEST).is_file():
        return damage(checkpoint, contents=contents)
    if not (checkpoint / STATE).is_file():
        return f"{STATE} is missing"
    return f"{STATE} was cut short while it was written" if read_state(checkpoint) is None else None


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """The whole checkpoint-N (`is_whole`) with the largest N, or None."""
    return next(filter(is_whole, newest_first(directory)), None)


def starting_point(
    run_dir: Path,
    resume: bool | str | os.PathLike[str],
    processes: int = 1,
    sharding: Sharding = "ddp",
) -> Path | None:
    """The checkpoint that a run goes on from, with everything that a run to the bit needs; None for a new run.

    Args:
        run_dir: the run's folder.
        resume: True for the latest whole checkpoint in it, "auto" for that or a new run where the folder holds no checkpoint, a
            checkpoint's path, or False for a new run.
        processes: number of processes that train.
        sharding: how they share weights and optimizer, see `rode.training.sharding`; each kind saves in its own way.

    Raises:
        FileExistsError: a new run, and `run_dir` holds a whole checkpoint.
        FileNotFoundError: no whole checkpoint.
        ValueError: the checkpoint named is damaged, or is of another number of processes or another kind of sharding.
    """
    if resume == AUTO:  # damaged ones are an error: a new run would replace them unseen
        resume = any(newest_first(run_dir))
        if not resume:
            return None
    if isinstance(resume, bool):
        if not resume:
            if (latest := latest_checkpoint(run_dir)) is not None:
                raise FileExistsError(
                    f"{run_dir} holds {latest.name}: pass --resume, or set another output_dir"
                )
            return None
        return _latest_usable(run_dir, processes, sharding)
    named = Path(resume)
    if not named.is_dir() or not any((named / name).is_file() for name in (STATE, MANIFEST)):
        raise FileNotFoundError(f"{resume}: no checkpoint ({STATE} is missing)")
    if (problem := _problem(named) or _lacks(named, processes, sharding)) is not None:
        raise ValueError(f"{named}: {problem}; resume from another checkpoint (--resume CHECKPOINT)")
    _say_if_unchecked(named)
    return named


def _latest_usable(run_dir: Path, processes: int, sharding: Sharding) -> Path:
    """The latest whole checkpoint; a line for each that is passed over. Raises FileNotFoundError."""
    passed: list[str] = []
    for path in newest_first(run_dir):
        problem = _problem(path) or _lacks(path, processes, sharding)
        if problem is None:
            for line in passed:
                logger.warning("%s: going on from %s", line, path.name)
            _say_if_unchecked(path)
            return path
        passed.append(f"{path} is passed over, as {problem}")
    if passed:
        raise FileNotFoundError(
            f"{run_dir} holds no whole checkpoint to resume from ({'; '.join(passed)}); leave --resume out to train anew"
        )
    raise FileNotFoundError(f"{run_dir}: no checkpoint to resume from; leave --resume out")


def _say_if_unchecked(checkpoint: Path) -> None:
    if not (checkpoint / MANIFEST).is_file():
        logger.warning(
            "%s has no %s, as an older version wrote it: that its files are there is known, not that they are unchanged",
            checkpoint,
            MANIFEST,
        )


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


def _lacks(checkpoint: Path, processes: int, sharding: Sharding) -> str | None:
    """Name the file that a checkpoint lacks to go on to the bit: Trainer goes on without, silently and with other results.

    Raises:
        ValueError: it is of another kind of run.
    """
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
            return f"{name} is missing, and without it training would go on with other results"
    if processes > 1 and f"rng_state_{processes}.pth" in there:
        raise ValueError(
            f"{checkpoint}: the checkpoint is of {_count(there)} and this run has {processes}; start it with as many"
        )
    return None


def _count(random: set[str]) -> str:
    """The number of processes that wrote these files of random state."""
    ranks = len(random - {"rng_state.pth"})
    return f"{ranks} processes" if ranks else "one process"
