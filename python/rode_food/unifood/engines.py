"""Where work on single records runs: processes of this machine, or Ray Data for those who outgrow it.

Both give every part of the work to the same function and hand its result back under the part's key, so the bytes
that a stage writes do not depend on the engine or the number of workers.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any, TypeVar

from rode_food.lines.store import CACHE_VARIABLE

ENGINES = ("local", "ray")
Function = Callable[[list[str]], list[str]]
Key = TypeVar("Key")


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: siblings hold the queue open."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _context() -> BaseContext:
    """How workers start. Not by a plain fork: this process may have threads (a progress bar's, a database's). A server that
    has imported this package once forks them without; where there is none each imports it for itself."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rode_food.unifood.stage"])
    return context


@dataclass(frozen=True)
class LocalEngine:
    """Processes of this machine; with one worker the work is done in this process.

    Attributes:
        workers: how many; at most twice as many parts are in memory.
    """

    workers: int = 1

    def map(
        self, function: Function, parts: Iterable[tuple[Key, list[str]]]
    ) -> Iterator[tuple[Key, list[str]]]:
        """(key, function(lines)) for every (key, lines), in the order in which they are done."""
        rest = iter(parts)
        first = list(itertools.islice(rest, 2))
        rest = itertools.chain(first, rest)
        if self.workers == 1 or len(first) < 2:
            yield from ((key, function(lines)) for key, lines in rest)
            return
        with ProcessPoolExecutor(self.workers, _context(), initializer=_die_with_parent) as pool:
            running: dict[Future[list[str]], Key] = {}
            try:
                while True:
                    for key, lines in itertools.islice(rest, 2 * self.workers - len(running)):
                        running[pool.submit(function, lines)] = key
                    if not running:
                        return
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield running.pop(future), future.result()
            finally:
                for future in running:
                    future.cancel()


def _apply(function: Function, row: dict[str, Any]) -> dict[str, Any]:
    return {"number": row["number"], "lines": function(list(row["lines"]))}


def _environment() -> dict[str, Any]:
    """Ray's workers have the environment in which Ray was started: give them what the work looks for in this one."""
    here = {name: os.environ[name] for name in ("NLTK_DATA", CACHE_VARIABLE) if name in os.environ}
    return {"runtime_env": {"env_vars": here}} if here else {}


@dataclass(frozen=True)
class RayEngine:
    """Ray Data on the cluster that `ray.init` finds (RAY_ADDRESS), or on this machine where there is none.

    Pictures are read where the work runs, so their paths must mean the same on every machine.

    Attributes:
        workers: tasks at a time; also the processors of a cluster started here.
    """

    workers: int = 1

    def map(
        self, function: Function, parts: Iterable[tuple[Key, list[str]]]
    ) -> Iterator[tuple[Key, list[str]]]:
        """(key, function(lines)) for every (key, lines); order within a window of parts is Ray's."""
        rest = iter(parts)
        window = list(itertools.islice(rest, 8 * self.workers))
        if not window:
            return
        ray = start_ray(self.workers)
        while window:
            rows = [{"number": i, "lines": lines} for i, (_, lines) in enumerate(window)]
            done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                partial(_apply, function),
                compute=ray.data.TaskPoolStrategy(size=min(self.workers, len(rows))),
                **_environment(),
            )
            for row in done.iter_rows():
                yield window[row["number"]][0], list(row["lines"])
            window = list(itertools.islice(rest, 8 * self.workers))


def start_ray(workers: int) -> ModuleType:
    """The `ray` module, connected; Ray stays up until the process ends.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("--engine ray: Ray Data is not installed: pip install 'rode[ray]'") from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)  # a plan and its end for every window of parts
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            ray.init(
                num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
            )
        ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def make_engine(name: str, workers: int | None = None) -> LocalEngine | RayEngine:
    """The engine of a name, with as many workers as this process may use processors by default.

    Raises:
        ValueError: for another name, or fewer than one worker.
    """
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    if name == "local":
        return LocalEngine(workers)
    if name == "ray":
        return RayEngine(workers)
    raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {name!r}")
