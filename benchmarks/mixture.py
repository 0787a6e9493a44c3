"""Times the operation against plain PyTorch on a device: forward, and forward with backward.

Each candidate's result is checked first. Rounds are interleaved in one process; what is reported is the median of per-round ratios,
with the first and last decile. On a GPU device events time each call after the L2 cache was overwritten; on a CPU a clock does.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks import write_json
from benchmarks.eager import packed, peft_loop
from rode_kernels import backends, rectified_mixture

PAPER = (2, 4, 8, 16)
Case = tuple[int, int, int, tuple[int, ...]]  # tokens, in_features, out_features, ranks
CASES: list[Case] = [(M, 4096, 4096, PAPER) for M in (1, 16, 64, 512, 2048, 8192, 65536)]
CASES += [(8192, 4096, 11008, PAPER), (8192, 4096, 4096, (8,) * 8), (8192, 4096, 4096, (16,) * 16)]
ON_CPU: list[Case] = [(M, K, K, PAPER) for K in (576, 4096) for M in (1, 64, 512)]


@dataclass
class Problem:
    """Tensors of one case on one device, about half of the gates open."""

    x: Tensor
    A: Tensor
    B: Tensor
    router: Tensor
    base: Tensor
    dy: Tensor
    ranks: tuple[int, ...]

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, device: str) -> Problem:
        M, K, O, ranks = case
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * std).to(dtype)

        R, N = sum(ranks), len(ranks)
        p = cls(
            normal(M, K),
            normal(R, K, std=K**-0.5),
            normal(O, R),
            normal(N, K, std=K**-0.5),
            normal(M, O),
            normal(M, O),
            ranks,
        )
        # Where a logit is 0 but for rounding, whether its gate has a gradient is a matter of rounding too: none of y's gets there.
        logits = torch.cat([part.float() @ p.router.float().t() for part in p.x.split(4096)])
        p.dy[logits.abs().amin(1) < 1e-3] = 0.0
        return p

    @property
    def scaling(self) -> tuple[float, ...]:
        return tuple(16.0 / r for r in self.ranks)

    @property
    def leaves(self) -> list[Tensor]:
        return [self.x, self.A, self.B, self.router, self.base]


def candidates(p: Problem, backend: str) -> dict[str, Callable[..., Tensor]]:
    """What is timed, as functions of (x, A, B, router, base). Compiled by torch.compile on a GPU only: its CPU compiler takes
    longer than the rest of the benchmark."""
    ranks, scaling, device = p.ranks, p.scaling, p.x.device
    expert = torch.arange(len(ranks), device=device).repeat_interleave(torch.tensor(ranks, device=device))
    factors = torch.tensor(scaling, dtype=p.x.dtype, device=device)[expert]
    down = torch.cat(
        [p.A, p.router]
    )  # made once for inference; in training A and the router change at every step

    def best_of_eager(x, A, B, W, base):
        return packed(x, torch.cat([A, W]) if A.requires_grad else down, B, factors, expert, base)

    runs = {
        backend: lambda x, A, B, W, base: rectified_mixture(
            x, A, B, W, ranks=ranks, scaling=scaling, base=base, backend=backend
        ),
        "packed": best_of_eager,
        "loop": lambda x, A, B, W, base: peft_loop(x, A, B, W, base, ranks, scaling),
    }
    if device.type == "cuda":
        runs["compiled"] = torch.compile(best_of_eager, dynamic=False)
    return runs


def gradients(
    p: Problem, run: Callable[..., Tensor], rows: slice = slice(None)
) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of x, A, B, the router's weights and base, from the tokens `rows`."""
    leaves = [p.x[rows], p.A, p.B, p.router, p.base[rows]]
    leaves = [t.detach().requires_grad_() for t in leaves]
    y = run(*leaves)
    return y.detach(), list(torch.autograd.grad(y, leaves, p.dy[rows].to(y.dtype)))


def check(p: Problem, run: Callable[..., Tensor], name: str, chunk: int = 4096) -> None:
    """All that is timed, y and gradients of all tokens, against float64 (a `chunk` of tokens at a time).

    Raises:
        RuntimeError: where one differs by more than rounding in this dtype explains, or is not finite.
    """
    wide = replace(p, A=p.A.double(), B=p.B.double(), router=p.router.double())
    y, (dx, dA, dB, dW, _) = gradients(p, run)
    bound = (16 if p.x.element_size() == 2 else 64) * torch.finfo(p.x.dtype).eps
    sums = [torch.zeros_like(t, dtype=torch.float64) for t in (dA, dB, dW)]

    def compare(what: str, got: Tensor, truth: Tensor) -> None:
        error = ((got.double() - truth).abs().max() / truth.abs().max()).item()
        if not error < bound:
            raise RuntimeError(f"{name} is wrong ({what}, relative error {error:.2e}): nothing is timed")

    def formula(x, A, B, W, base):
        return peft_loop(x.double(), A, B, W, base.double(), p.ranks, p.scaling)

    for first in range(0, p.x.shape[0], chunk):
        rows = slice(first, first + chunk)
        truth, (of_x, *others, _) = gradients(wide, formula, rows)
        compare("y", y[rows], truth)
        compare("the gradient of x", dx[rows], of_x)
        for total, part in zip(sums, others, strict=True):
            total += part
    for what, got, truth in zip(("A", "B", "the router"), (dA, dB, dW), sums, strict=True):
        compare(f"the gradient of {what}", got, truth)


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


def run_case(backend: str, device: str, dtype: torch.dtype, case: Case, rounds: int) -> list[dict]:
    p = Problem.random(case, dtype, device)
    flush = None if device == "cpu" else torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    rows, runs = [], candidates(p, backend)
    for name, run in runs.items():
        check(p, run, name)
    for what in ("forward", "forward + backward"):
        calls = {}
        for name, run in runs.items():
            leaves = [t.detach().requires_grad_(what != "forward") for t in p.leaves]

            def call(run=run, leaves=leaves):
                y = run(*leaves)
                return torch.autograd.grad(y, leaves, p.dy) if y.requires_grad else y

            call(), call()  # compiles, tunes, warms up
            calls[name] = call
        times = {name: [] for name in calls}
        for i in range(rounds):
            order = list(calls)
            first = i % len(order)
            for name in order[first:] + order[:first]:
                times[name].append(seconds(calls[name], device, flush))
        for other in order[1:]:
            ratios = sorted(t / mine for t, mine in zip(times[other], times[backend], strict=True))
            rows.append(
                {
                    **{
                        **dict(zip(("tokens", "in_features", "out_features", "ranks"), case, strict=True)),
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
                    "clock_mhz": clock(device),  # right after the last round
                }
            )
    return rows


def describe(device: str) -> str:
    if device == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    properties, mhz = torch.cuda.get_device_properties(device), clock(device)
    rate = "clock unknown (pip install nvidia-ml-py)" if mhz is None else f"{mhz} MHz"
    return f"{properties.name}, {properties.multi_processor_count} multiprocessors, {rate}"


def clock(device: str) -> int | None:
    """Of the multiprocessors, now, in MHz; None where it cannot be told."""
    if device == "cpu":
        return None
    try:
        return torch.cuda.clock_rate()
    except Exception:  # it needs a package that many machines lack
        return None


def main(backend: str, json_file: str | None, rounds: int) -> None:
    status = backends()[backend]
    device = "cpu" if backend in ("cpu", "reference") else "cuda"
    cases = ON_CPU if device == "cpu" else CASES
    dtypes = (torch.float32, torch.bfloat16)
    if not status.available or (device == "cuda" and not torch.cuda.is_available()):
        print(f"{backend} cannot run here: {status.reason}. On a machine where it can, this would run")
        for M, K, O, ranks in cases:
            print(
                f"  M = {M}, K = {K}, O = {O}, ranks {ranks}, float32 and bfloat16: forward, forward + backward"
            )
        print(
            "each against packed PyTorch, the same compiled, and a loop over experts, results checked first, rounds interleaved."
        )
        return
    print(
        f"{backend} on {describe(device)}, torch {torch.__version__}; how many times faster than plain PyTorch"
    )
    rows = []
    for dtype in dtypes:
        for case in cases:
            for row in run_case(backend, device, dtype, case, rounds):
                rows.append(row)
                print(
                    f"  {row['dtype']:15} M {row['tokens']:6} K {row['in_features']:5} R {sum(row['ranks']):4} {row['what']:18} "
                    f"{row['milliseconds']:9.3f} ms  against {row['against']:8} {row['ratio']:6.2f}x "
                    f"({row['low']:.2f} to {row['high']:.2f})",
                    flush=True,
                )
    if json_file:
        write_json(json_file, {"machine": describe(device), "rows": rows})
