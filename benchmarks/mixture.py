"""Times the operation against plain PyTorch on a device: forward, and forward with backward.

Each candidate's result is checked first. Rounds are interleaved in one process; what is reported is the median of per-round ratios,
with the first and last decile. On a GPU device events time each call after the L2 cache was overwritten; on a CPU a clock does.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import write_json
from benchmarks.eager import packed, peft_loop
from rode_kernels import backends, rectified_mixture

RANKS = (2, 4, 8, 16)
SCALING = tuple(16.0 / r for r in RANKS)
CASES = [(M, 4096, 4096) for M in (1, 16, 64, 512, 2048, 8192, 65536)]
ON_CPU = [(M, K, K) for K in (576, 4096) for M in (1, 64, 512)]


@dataclass
class Problem:
    """Tensors of one case on one device, about half of the gates open."""

    x: Tensor
    A: Tensor
    B: Tensor
    router: Tensor
    base: Tensor
    dy: Tensor

    @classmethod
    def random(cls, M: int, K: int, O: int, dtype: torch.dtype, device: str) -> Problem:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

        R, N = sum(RANKS), len(RANKS)
        return cls(
            normal(M, K),
            normal(R, K, std=K**-0.5),
            normal(O, R),
            normal(N, K, std=K**-0.5),
            normal(M, O),
            normal(M, O),
        )

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.A, self.B, self.router, self.base]


def candidates(p: Problem, backend: str) -> dict[str, Callable[..., Tensor]]:
    """What is timed, as functions of (x, A, B, router, base)."""
    expert = torch.arange(len(RANKS), device=p.x.device).repeat_interleave(
        torch.tensor(RANKS, device=p.x.device)
    )
    factors = torch.tensor(SCALING, dtype=p.x.dtype, device=p.x.device)[expert]
    down = torch.cat(
        [p.A, p.router]
    )  # for inference made once; in training A and the router change at every step
    return {
        backend: lambda x, A, B, W, base: rectified_mixture(
            x, A, B, W, ranks=RANKS, scaling=SCALING, base=base, backend=backend
        ),
        "packed": lambda x, A, B, W, base: packed(
            x, torch.cat([A, W]) if A.requires_grad else down, B, factors, expert, base
        ),
        "loop": lambda x, A, B, W, base: peft_loop(x, A, B, W, base, RANKS, SCALING),
    }


def check(p: Problem, run: Callable[..., Tensor], name: str) -> None:
    """On the first tokens, against float64."""
    few = [p.x[:256], p.A, p.B, p.router, p.base[:256]]
    wide = [t.double() for t in few]
    truth = peft_loop(*wide, RANKS, SCALING)
    error = ((run(*few).double() - truth).abs().max() / truth.abs().max()).item()
    if not error < 8 * torch.finfo(p.x.dtype).eps:
        raise RuntimeError(f"{name} is wrong (relative error {error:.2e}): nothing is timed")


def seconds(call: Callable[[], object], device: str, flush: Tensor | None) -> float:
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush.zero_()  # nothing of the last call is left in the L2 cache
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def run_case(
    backend: str, device: str, dtype: torch.dtype, M: int, K: int, O: int, rounds: int
) -> list[dict]:
    p = Problem.random(M, K, O, dtype, device)
    flush = None if device == "cpu" else torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    rows = []
    for what in ("forward", "forward + backward"):
        calls = {}
        for name, run in candidates(p, backend).items():
            check(p, run, name)
            leaves = [t.detach().requires_grad_(what != "forward") for t in p.leaves]

            def call(run=run, leaves=leaves):
                y = run(*leaves)
                return torch.autograd.grad(y, leaves, p.dy) if y.requires_grad else y

            call(), call()  # compiles, tunes, warms up
            calls[name] = call
        times = {name: [] for name in calls}
        for i in range(rounds):
            order = list(calls)
            for name in order[i % 3 :] + order[: i % 3]:
                times[name].append(seconds(calls[name], device, flush))
        for other in ("packed", "loop"):
            ratios = sorted(t / mine for t, mine in zip(times[other], times[backend], strict=True))
            rows.append(
                {
                    **{
                        "tokens": M,
                        "in_features": K,
                        "out_features": O,
                        "dtype": str(dtype),
                        "what": what,
                        "against": other,
                    },
                    **{
                        "ratio": statistics.median(ratios),
                        "low": ratios[len(ratios) // 10],
                        "high": ratios[-1 - len(ratios) // 10],
                    },
                    "milliseconds": 1000 * statistics.median(times[backend]),
                }
            )
    return rows


def describe(device: str) -> str:
    if device == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.cuda.get_device_properties(device)
    try:
        clock = f", {torch.cuda.clock_rate()} MHz"
    except Exception:  # the clock needs a package that many machines lack
        clock = ", clock unknown"
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors{clock}"


def main(backend: str, json_file: str | None, rounds: int) -> None:
    status = backends()[backend]
    device = "cpu" if backend in ("cpu", "reference") else "cuda"
    cases = ON_CPU if device == "cpu" else CASES
    dtypes = (torch.float32, torch.bfloat16)
    if not status.available or (device == "cuda" and not torch.cuda.is_available()):
        print(f"{backend} cannot run here: {status.reason}. On a machine where it can, this would run")
        for M, K, O in cases:
            print(
                f"  M = {M}, K = {K}, O = {O}, ranks {RANKS}, float32 and bfloat16: forward, forward + backward"
            )
        print(
            "each against packed PyTorch and a loop over experts, results checked first, rounds interleaved."
        )
        return
    print(
        f"{backend} on {describe(device)}, torch {torch.__version__}; how many times faster than plain PyTorch"
    )
    rows = []
    for dtype in dtypes:
        for case in cases:
            for row in run_case(backend, device, dtype, *case, rounds):
                rows.append(row)
                print(
                    f"  {row['dtype']:15} M {row['tokens']:6} K {row['in_features']:5} {row['what']:18} "
                    f"{row['milliseconds']:9.3f} ms  against {row['against']:6} {row['ratio']:6.2f}x "
                    f"({row['low']:.2f} to {row['high']:.2f})",
                    flush=True,
                )
    if json_file:
        write_json(json_file, {"machine": describe(device), "rows": rows})
