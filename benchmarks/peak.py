"""Peak rates of the machine, measured on the spot: operations a second and bytes a second, with as many threads as torch uses.

On a CPU a few lines of C++ (peak.cpp) are compiled and run: multiply-adds from registers, reads and copies of memory that no cache
holds. Best runs count, so that a result's share of it is not flattered by a slow moment. On a GPU: the best of large matrix
products and of copies.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import cache_bytes, dtype_name, seconds
from benchmarks.work import Work

SOURCE = Path(__file__).with_name("peak.cpp")
# Runs are short, so many and over so long a time that the best of them met nobody, not even torch's threads as they wait.
REPEATS = 40
SECONDS = 0.5


@dataclass(frozen=True)
class Peak:
    """A roofline.

    Attributes:
        how: what measured it.
        operations: a second, by the dtype of x; a multiplication and an addition are two. read, copy: bytes a second (a copy counts
            what it reads and what it writes).
    """

    how: str
    operations: dict[str, float]
    read: float
    copy: float

    def floor(self, work: Work, dtype: torch.dtype) -> tuple[float, str]:
        """Seconds that no implementation can do without here, and whether "compute" or "memory" asks for them."""
        compute = work.operations / self.operations[dtype_name(dtype)]
        memory = work.bytes / max(self.read, self.copy)
        return (compute, "compute") if compute > memory else (memory, "memory")

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in self.operations.items())
        return (
            f"roofline, measured now ({self.how}): Gflop/s {rates}; GB/s read {self.read / 1e9:.1f}, "
            f"copy {self.copy / 1e9:.1f}"
        )

    def json(self) -> dict[str, Any]:
        return asdict(self)


def compiler() -> str | None:
    """The C++ compiler's path: CXX, else g++ or clang++; None where there is none. torch.compile asks for one on a CPU as well."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def measure(device: str) -> Peak | None:
    """The roofline of a device; None on a CPU without a C++ compiler."""
    if device != "cpu":
        return _of_products(device)
    cxx = compiler()
    return None if cxx is None else _of_cpu(cxx, torch.get_num_threads())


def cached_read(size: int) -> Callable[[], float] | None:
    """A function that gives the seconds in which this thread reads `size` bytes once, from cache as far as they fit; None without a
    C++ compiler."""
    cxx = compiler()
    if cxx is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        native = _build(cxx, folder)
    memory = torch.ones(size // 4)
    return lambda: native.read_again_seconds(memory.data_ptr(), size, 20)


def _best(run: Callable[[], float]) -> float:
    best, count, start = run(), 0, time.perf_counter()
    while count < REPEATS or time.perf_counter() - start < SECONDS:
        best, count = min(best, run()), count + 1
    return best


def _build(cxx: str, folder: str) -> ctypes.CDLL:
    library = Path(folder) / "peak.so"
    command = [cxx, "-std=c++17", "-O3", "-march=native", "-pthread", "-shared", "-fPIC"]
    done = subprocess.run([*command, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{cxx} does not compile {SOURCE.name}: {done.stderr.strip().splitlines()[0]}")
    loaded = ctypes.CDLL(str(library))
    pointer, size, count, long = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_long
    for name, arguments in {
        "float32_operations": [],
        "bfloat16_operations": [],
        "float32_seconds": [long, count],
        "bfloat16_seconds": [long, count],
        "read_seconds": [pointer, size, count],
        "read_again_seconds": [pointer, size, count],
        "copy_seconds": [pointer, pointer, size, count],
    }.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = ctypes.c_double, arguments
    return loaded


def _of_cpu(cxx: str, threads: int, repetitions: int = 500_000) -> Peak:
    with tempfile.TemporaryDirectory() as folder:
        native = _build(cxx, folder)  # stays loaded when its file is gone
    # Buffers as torch allocates them. They are read part after part, so that none is in cache when its turn comes and each takes
    # a moment only.
    size, parts = cache_bytes("cpu") // 2, 8
    source, target = (torch.ones(parts, size // 4) for _ in range(2))
    rows = cycle(zip(source, target, strict=True))

    def read_next() -> float:
        return native.read_seconds(next(rows)[0].data_ptr(), size, threads)

    def copy_next() -> float:
        a, b = next(rows)
        return native.copy_seconds(a.data_ptr(), b.data_ptr(), size, threads)

    done = repetitions * threads
    single = native.float32_operations() * done / _best(lambda: native.float32_seconds(repetitions, threads))
    half = single  # products of 16-bit numbers are made from float32 where nothing else is
    if native.bfloat16_operations():
        half = (
            native.bfloat16_operations() * done / _best(lambda: native.bfloat16_seconds(repetitions, threads))
        )
    read, copy = size / _best(read_next), 2 * size / _best(copy_next)
    how = f"{Path(cxx).name} -march=native, {threads} thread{'s' * (threads > 1)}"
    return Peak(how, {"float32": single, "bfloat16": half, "float16": single}, read, copy)


def _of_products(device: str, width: int = 8192, size: int = 2**30) -> Peak:
    """From the best of square products and of copies."""
    operations = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))
        best = _best(lambda a=a, b=b: seconds(lambda: a @ b, device))
        operations[dtype_name(dtype)] = 2.0 * width**3 / best
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    rate = 2.0 * size / _best(lambda: seconds(lambda: target.copy_(source), device))
    return Peak("products of PyTorch, copies", operations, rate, rate)
