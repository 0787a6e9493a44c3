"""Timing that several benchmarks share: calls interleaved round by round in one process, ratios per round, where it ran."""

from __future__ import annotations

import datetime
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value; of fewer than four the quartiles are the extremes."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return Spread(statistics.median(ordered), ordered[quarter], ordered[-1 - quarter])


def seconds(
    call: Callable[[], object],
    device: str = "cpu",
    flush: Tensor | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Of one call: by a clock on a CPU, by device events on a GPU, after `flush` has overwritten its L2 cache."""
    if device == "cpu":
        start = clock()
        call()
        return clock() - start
    flush.zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call in each round. Every round runs all of them, beginning with another one each time, so that a slow
    moment of the machine meets all alike."""
    flush = None if device == "cpu" else torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    for call in calls.values():
        for _ in range(warm_up):  # compiles, tunes, fills caches
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(calls[name], device, flush, clock))
    return times


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


def machine(device: str = "cpu") -> dict[str, Any]:
    """What a result must be read with: machine, threads, versions, date."""
    import peft
    import transformers

    return {
        "machine": cpu_name() if device == "cpu" else torch.cuda.get_device_properties(device).name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "date": datetime.date.today().isoformat(),
    }


def headline(about: dict[str, Any]) -> str:
    """One line of `machine`'s facts."""
    return f"{about['machine']}, {about['threads']} threads, torch {about['torch']}, {about['date']}"
