"""Reading a made-up Recipe1M of several sizes, and what the builder does with it before it looks at pictures: seconds, records a
second and peak memory, each in a process of its own.

What is read is checked first, record by record against what was written, by a digest; then it is read once more and timed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import write_json
from benchmarks.made_up_recipe1m import digest, expected_digest, write_recipe1m
from rode_food.unifood import select
from rode_food.unifood.engines import LocalEngine
from rode_food.unifood.settings import SourceSettings, UnifoodSettings
from rode_food.unifood.stage import Stage

PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes


def check_reading(folder: Path, recipes: int) -> dict[str, Any]:
    """Raises RuntimeError if anything but exactly what was written is read."""
    records = _read(folder)
    rows = ((r.id, r.title, len(r.ingredients), len(r.instructions)) for r in records)
    if digest(rows) != expected_digest(recipes):
        raise RuntimeError(f"reading {recipes:,} recipes is wrong: nothing is timed")
    return {}


def time_reading(folder: Path, recipes: int) -> dict[str, Any]:
    records = _read(folder)
    before = _peak()
    start = time.perf_counter()
    count = sum(1 for _ in records)
    seconds = time.perf_counter() - start
    return {
        "records": count,
        "seconds": seconds,
        "per_second": count / seconds,
        "peak_mib": _peak(),
        "imports_mib": before,
    }


def _stage(folder: Path, recipes: int) -> Stage:
    """Select's, in the benchmark's scratch folder: a tenth of the recipes is to be chosen."""
    settings = UnifoodSettings(sources=[SourceSettings("recipe1m", str(folder))])
    settings.select.size = max(1, recipes // 10)
    work = folder.with_name("select")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    return Stage("select", work, None, settings, LocalEngine(), progress=False)


def check_choosing(folder: Path, recipes: int) -> dict[str, Any]:
    """Raises RuntimeError if the order of the candidates lacks one or is unbalanced."""
    stage = _stage(folder, recipes)
    candidates, report = select._read(stage)
    order = select._order(candidates)
    first = candidates.split[order[: stage.settings.select.size]]
    shares = [abs((candidates.split == s).mean() - (first == s).mean()) for s in range(3)]
    if (
        report["read"] != recipes
        or sorted(order) != list(range(len(candidates.split)))
        or max(shares) > 2 / len(first)
    ):
        raise RuntimeError(f"choosing from {recipes:,} recipes is wrong: nothing is timed")
    return {}


def time_choosing(folder: Path, recipes: int) -> dict[str, Any]:
    stage = _stage(folder, recipes)
    before = _peak()
    start = time.perf_counter()
    candidates, report = select._read(stage)
    select._order(candidates)
    seconds = time.perf_counter() - start
    return {
        "records": report["read"],
        "seconds": seconds,
        "per_second": report["read"] / seconds,
        "peak_mib": _peak(),
        "imports_mib": before,
    }


MEASURES: dict[str, tuple[Callable[[Path, int], dict[str, Any]], Callable[[Path, int], dict[str, Any]]]] = {
    "read": (check_reading, time_reading),
    "choose": (check_choosing, time_choosing),
}
"""What can be measured -> its check and its measurement, functions of (folder of the made-up Recipe1M, its recipes)."""


def _read(folder: Path) -> Any:
    from rode_food.readers import read_source
    from rode_food.readers.log import ReadLog

    return read_source("recipe1m", folder, ReadLog(strict=True))


def _peak() -> float:
    """MiB of memory that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT / 2**20


def in_a_process(measure: str, part: int, folder: Path, recipes: int) -> dict[str, Any]:
    """The check (part 0) or the measurement (part 1) in a fresh process, whose memory is its own.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.data", measure, str(part), str(folder), str(recipes)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{measure} of {recipes:,}: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(options: argparse.Namespace) -> None:
    rows = []
    print(
        f"{'':6} {'recipes':>10} {'records':>10} {'seconds':>9} {'per second':>11} {'peak, MiB':>10} {'of imports':>11}"
    )
    for recipes in options.recipes:
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            folder = Path(scratch) / "recipe1m"
            write_recipe1m(folder, recipes)
            for measure in MEASURES:
                in_a_process(measure, 0, folder, recipes)
                row = in_a_process(measure, 1, folder, recipes)
                rows.append({"measure": measure, "recipes": recipes, **row})
                print(
                    f"{measure:6} {recipes:>10,} {row['records']:>10,} {row['seconds']:>9.1f} {row['per_second']:>11,.0f} "
                    f"{row['peak_mib']:>10.0f} {row['imports_mib']:>11.0f}",
                    flush=True,
                )
            if options.json:  # before a million pictures are removed, which takes minutes
                write_json(
                    options.json, {"benchmark": "data", "python": sys.version.split()[0], "rows": rows}
                )


if __name__ == "__main__":
    name, part, path, size = sys.argv[1:]
    print(json.dumps(MEASURES[name][int(part)](Path(path), int(size))))
