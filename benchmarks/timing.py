"""Timing that several benchmarks share: calls interleaved round by round in one process, ratios per round, where it ran."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def text(self, digits: int = 2) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"

    def __str__(self) -> str:
        return self.text()


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles of at least one value; the quartiles of fewer than four are the extremes."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Spread(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def cache_bytes(device: str = "cpu") -> int:
    """Bytes of the last cache before memory; 64 MiB where that cannot be told."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    caches = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    return int(caches[-1].read_text().strip().removesuffix("K")) * 1024 if caches else 64 * 2**20


SPINS = 2e9  # of torch.cuda._sleep in a second, on the fastest multiprocessors


def seconds(
    call: Callable[[], object],
    device: str = "cpu",
    flush: Tensor | None = None,
    clock: Callable[[], float] = time.perf_counter,
    ahead: float = 0.0,
) -> float:
    """The time of one call: by a clock on a CPU, by device events on a GPU. `flush` overwrites the cache before.

    `ahead`: for so long a GPU is kept busy first, so that all of the call's launches wait for it in the queue: its own time is
    measured then, and not how fast the host can ask.
    """
    if flush is not None:
        flush.add_(1)
    if device == "cpu":
        start = clock()
        call()
        return clock() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if ahead > 0:
        torch.cuda._sleep(int(ahead * SPINS))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    device: str = "cpu",
    warm_up: int = 2,
    *,
    prepared: bool = False,
    flush: bool = False,
    clock: Callable[[], float] = time.perf_counter,
    host: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each call in each round. Every round runs all of them, beginning with another one each time, so that a slow
    moment of the machine meets all alike.

    Args:
        prepared: a call is not timed but returns what is. flush: its caches are overwritten in between; on a GPU they always are.
        host: takes the seconds in which the host asks a GPU for each call; those of the rounds are then the device's alone.
    """
    of_cache = None
    if flush or device != "cpu":
        of_cache = torch.zeros(2 * cache_bytes(device) // 4, device=device)

    asking: dict[str, float] = {}

    def once(name: str) -> float:
        call = calls[name]() if prepared else calls[name]
        return seconds(call, device, of_cache, clock, 2 * asking.get(name, 0.0))

    for name, call in calls.items():
        for _ in range(warm_up):  # compiles, tunes, fills caches
            once(name)
        if host is not None and device != "cpu":
            asking[name] = host[name] = _asking(call, prepared)
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(once(name))
    return times


def _asking(call: Callable[[], Any], prepared: bool, repeats: int = 3) -> float:
    """Seconds in which the host asks a GPU for a call, without waiting for it: the median of some."""
    found = []
    for _ in range(repeats):
        run = call() if prepared else call
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def ratios(times: dict[str, list[float]], of: str, to: str) -> Spread:
    """Per round, the seconds of one over the seconds of the other."""
    return spread([a / b for a, b in zip(times[of], times[to], strict=True)])


def cpu_name() -> str:
    """The processor's model, as Linux tells it, else what Python knows."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version(name: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return installed(name)
    except PackageNotFoundError:
        return None


def clock(device: str) -> int | None:
    """The clock of a GPU's multiprocessors now, in MHz; None where it cannot be told."""
    if device == "cpu":
        return None
    try:
        return torch.cuda.clock_rate()
    except Exception:  # it needs a package that many machines lack
        return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def machine(device: str = "cpu") -> dict[str, Any]:
    """The conditions of a measurement: machine, threads, versions, date."""
    return {
        "machine": cpu_name() if device == "cpu" else torch.cuda.get_device_properties(device).name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: version(name) for name in ("transformers", "peft", "rode")},
        "date": datetime.date.today().isoformat(),
    }


def headline(about: dict[str, Any]) -> str:
    """One line of `machine`'s facts."""
    return f"{about['machine']}, {about['threads']} threads, torch {about['torch']}, {about['date']}"
