"""One run at a time in an output folder."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from rode.processes import of_all_processes

if TYPE_CHECKING:
    from transformers import TrainingArguments

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
NAME = ".lock"
_held: set[int] = set()  # descriptors


def _close_in_child() -> None:
    """A lock lasts until the last copy of its descriptor is closed: workers of a data loader can outlive a killed run."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def folder_lock(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder (made if need be) for this process. The system lets go of it when the process ends, however it ends.

    Where a folder cannot be locked (read-only, a file system or a system without such locks) a line says so, and nothing is held.

    Raises:
        BlockingIOError: another process, or another thread, holds it.
    """
    folder = Path(folder)
    if fcntl is None:
        logger.warning("%s cannot be locked on this system: see to it that no other run writes there", folder)
        yield
        return
    new, owner = not folder.exists(), os.getpid()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _take(folder / NAME)
    except BlockingIOError:
        raise
    except OSError as error:
        logger.warning(
            "%s cannot be locked (%s): see to it that no other run writes there", folder, error.strerror
        )
        yield
        return
    _held.add(descriptor)
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a forked child
            _held.discard(descriptor)
            with suppress(OSError):
                (folder / NAME).unlink()  # before the lock goes, or it could be another's by then
            os.close(descriptor)
            if new:
                with suppress(OSError):  # it holds files
                    folder.rmdir()


def _take(file: Path) -> int:
    """The descriptor of the locked file."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is(file, descriptor):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BlockingIOError(
                f"{file.parent}: another run is at work there ({holder}); wait for its end, or set another output_dir"
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is(file: Path, descriptor: int) -> bool:
    """Whether the open file still has its name: whoever held the lock may have removed it in between."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False


@contextmanager
def one_run(folder: str | os.PathLike[str], arguments: TrainingArguments) -> Iterator[None]:
    """Hold a run's folder on behalf of all its processes: the main one takes it, and all stop where it is taken.

    Args:
        folder: of the run.
        arguments: transformers' TrainingArguments, which have set up torch.distributed.

    Raises:
        BlockingIOError: another run is at work there.
    """
    with ExitStack() as stack:
        refusal: list[str | None] = [None]
        if arguments.process_index == 0:
            try:
                stack.enter_context(folder_lock(folder))
            except BlockingIOError as error:
                refusal = [str(error)]
        if arguments.world_size > 1:
            import torch

            torch.distributed.broadcast_object_list(refusal, src=0)
        if refusal[0] is not None:
            raise of_all_processes(BlockingIOError(refusal[0]))
        yield
