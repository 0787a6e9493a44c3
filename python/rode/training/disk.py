"""A full disk, in one sentence; and a warning before it is full."""

from __future__ import annotations

import errno
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rode.training.checkpoints import latest_checkpoint

logger = logging.getLogger(__name__)
_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's writer and safetensors raise errors of their own, without a number
_WORDS = re.compile(
    r"iostream error|unexpected pos|PytorchStreamWriter failed|no space left|quota exceeded|file too large",
    re.IGNORECASE,
)
_BYTES = 3 * 4  # of a trained weight in a checkpoint: itself and Adam's two moments, in float32


class DiskFullError(OSError):
    """A file could not be written for want of space. The message names where, and from where the run can go on."""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk, a quota or a limit of file sizes was reached."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _NUMBERS
    return bool(_WORDS.search(str(error)))


@contextmanager
def names_full_disk(run_dir: Path) -> Iterator[None]:
    """Turns what libraries raise where a disk is full into one sentence.

    Raises:
        DiskFullError: in place of such an error.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        last = latest_checkpoint(run_dir)
        on = "start the run anew: there is no checkpoint" if last is None else f"go on with --resume ({last})"
        where = getattr(error, "filename", None) or run_dir
        raise DiskFullError(
            f"{where}: no space left ({_size(_free(run_dir))} free), so a file could not be written; make room, and {on}"
        ) from error


@dataclass(frozen=True)
class Space:
    """Space that a run needs on disk, and what is free.

    Attributes:
        checkpoint: bytes of one checkpoint. needed: of those to come and of the weights at the end. free: where the run writes.
    """

    checkpoint: int
    needed: int
    free: int

    def __str__(self) -> str:
        return (
            f"a checkpoint takes about {_size(self.checkpoint)}; checkpoints and adapter will need about {_size(self.needed)}, and "
            f"{_size(self.free)} are free there"
        )


def space_of(run_dir: Path, trained: int, kept: int) -> Space:
    """The space that checkpoints will need.

    Args:
        run_dir: the run's folder, which need not be there yet.
        trained: number of trained weights.
        kept: how many checkpoints the run keeps; one more is there while it is written.
    """
    there = sum(1 for path in run_dir.glob("checkpoint-*") if path.is_dir())
    needed = trained * _BYTES * max(1, kept + 1 - there) + trained * 4
    exists = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    return Space(trained * _BYTES, needed, _free(exists))


def warn_about_space(run_dir: Path, trained: int, kept: int) -> None:
    """Say so where checkpoints will need more space than is free.

    Args:
        run_dir, trained, kept: see `space_of`.
    """
    space = space_of(run_dir, trained, kept)
    if space.needed > space.free:
        logger.warning(
            "%s: checkpoints and adapter will need about %s, and %s are free there; make room, or lower training.save_total_limit "
            "(%d)",
            run_dir,
            _size(space.needed),
            _size(space.free),
            kept,
        )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
