"""The overhead of a call: one token, K = O = 16, ranks 2, 4, 8, 16, on the CPU backend. And what the work itself costs
at K = O = 4096 where weights are in cache, beside reading A and B from there.

Overhead is the time of a call less that of the native call alone, on the same memory. Everything happens on one thread, and its own
time is counted: what other processes take of the processor is not. Each timing is a run of calls; rounds are interleaved.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import eager, write_json
from benchmarks.cases import PAPER
from benchmarks.peak import cached_read
from benchmarks.timing import headline, interleaved, machine, spread
from rode_kernels import backends, fast_path, rectified_mixture
from rode_kernels.backends import cpu
from rode_kernels.checks import check_inputs, check_x
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import ForwardOperands, Settings

WIDTH = 16
CALLS = 50
LIMITS = {"without gradients": 12.0, "with gradients": 15.0}  # microseconds of overhead
DECODING = 4096  # the width at which the work of one token is measured
# About half of the ranks are open in both.
OPEN = {"2, 4, 8 open": (1.0, 1.0, 1.0, -1.0), "16 open": (-1.0, -1.0, -1.0, 1.0)}


def repeated(call: Callable[[], object], grad: bool = False) -> Callable[[], None]:
    def run() -> None:
        with torch.set_grad_enabled(grad):
            for _ in range(CALLS):
                call()

    return run


def trained(run: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    dy = torch.ones(1, WIDTH)
    return lambda: torch.autograd.grad(run(), leaves, dy)


def native_call(
    x: Tensor, A: Tensor, B: Tensor, router: Tensor, base: Tensor, scaling: tuple[float, ...]
) -> tuple[Callable[[], object], tuple[Tensor, Tensor, Tensor]]:
    """The core on one token and one thread, and where it writes y, u and gates."""
    outputs = y, u, g = torch.empty(1, B.shape[0]), torch.empty(1, A.shape[0]), torch.empty(1, len(PAPER))
    operands = ForwardOperands(x, A, B, router, None, None, base, None)
    key = cpu._key(operands, Settings(make_mixture(PAPER, scaling), 0.0, False))
    native = cpu._native_forward(key, x.stride(), base.stride(), y.stride())
    memory = (x, base, y, A, B, router, None, u, g, None)
    addresses = (*(0 if t is None else t.data_ptr() for t in memory), 1)
    return lambda: native(*addresses) or memory, outputs  # memory must outlive the calls


def calls() -> dict[str, Callable[[], None]]:
    """Functions by name: the call, its parts, and what to compare it with."""
    generator = torch.Generator().manual_seed(0)
    R, N = sum(PAPER), len(PAPER)
    scaling = tuple(16.0 / r for r in PAPER)
    x, base = (torch.randn(1, WIDTH, generator=generator) for _ in range(2))
    A, B, router = (
        nn.Parameter(torch.randn(shape, generator=generator))
        for shape in ((R, WIDTH), (WIDTH, R), (N, WIDTH))
    )
    options = {"ranks": PAPER, "scaling": scaling, "base": base, "backend": "cpu"}
    mixture = make_mixture(PAPER, scaling)
    operands = ForwardOperands(x, A, B, router, None, None, base, None)
    settings = Settings(mixture, 0.0, False)
    static = (PAPER, scaling, 0.0, False, "cpu")

    side_by_side = nn.Parameter(torch.cat([A, router]))
    down, expert = side_by_side.detach(), torch.repeat_interleave(torch.tensor(PAPER))
    factors = torch.tensor(scaling)[expert]
    want = eager.packed(x, down, B, factors, expert, base)
    for way in ({}, {"seed": 0}):  # the short way, then the long one
        y = rectified_mixture(x, A, B, router, **way, **options)
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
    known = fast_path.find(operands, mixture, 0.0, False, "cpu")

    native, _ = native_call(x, A, B, router, base, scaling)
    runs = {
        "native call": repeated(native),
        "without gradients": repeated(lambda: rectified_mixture(x, A, B, router, **options)),
        "with gradients": repeated(lambda: rectified_mixture(x, A, B, router, **options), grad=True),
        "forward and backward": repeated(
            trained(lambda: rectified_mixture(x, A, B, router, **options), A, B, router), True
        ),
        "ranks and scaling": repeated(lambda: make_mixture(PAPER, scaling)),
        # no call with a seed goes the short way, not even one that drops nothing
        "long way, without gradients": repeated(
            lambda: rectified_mixture(x, A, B, router, seed=0, **options)
        ),
        "long way, with gradients": repeated(
            lambda: rectified_mixture(x, A, B, router, seed=0, **options), grad=True
        ),
        "long way, checks": repeated(lambda: (check_x(x), check_inputs(operands, settings))),
        "long way, dispatcher and backend": repeated(lambda: torch.ops.rode.mixture(*operands, *static)),
        "long way, backend": repeated(lambda: cpu.forward(operands, settings, False)),
        "F.linear": repeated(lambda: F.linear(x, A)),
        "F.linear, with gradients": repeated(lambda: F.linear(x, A), grad=True),
        "packed PyTorch": repeated(lambda: eager.packed(x, down, B, factors, expert, base)),
        "packed PyTorch, with gradients": repeated(
            lambda: eager.packed(x, torch.cat([A, router]), B, factors, expert, base), grad=True
        ),
        "packed PyTorch, forward and backward": repeated(
            trained(lambda: eager.packed(x, side_by_side, B, factors, expert, base), side_by_side, B), True
        ),
    }
    if known is not None:
        runs["guard"] = repeated(lambda: fast_path.find(operands, mixture, 0.0, False, "cpu"))
        runs["outputs, addresses and native call"] = repeated(lambda: known.run(operands))
    return runs


def decoding() -> dict[str, Callable[[], None]]:
    """One token with the same weights again and again, the native call alone."""
    generator = torch.Generator().manual_seed(0)
    R, K = sum(PAPER), DECODING
    scaling = tuple(16.0 / r for r in PAPER)
    x, base = (torch.randn(1, K, generator=generator) for _ in range(2))
    A, B = (torch.randn(shape, generator=generator) / K**0.5 for shape in ((R, K), (K, R)))
    runs = {}
    for name, h in OPEN.items():
        router = torch.tensor(h)[:, None] * x / x.square().sum()  # whose products with x are h
        call, (y, _, g) = native_call(x, A, B, router, base, scaling)
        call()
        factors = torch.tensor(scaling).mul(g[0]).repeat_interleave(torch.tensor(PAPER))
        want = base + (x @ A.T * factors) @ B.T
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-4)
        runs[name] = repeated(call)
    return runs


def report_decoding(rounds: int, call: float) -> dict[str, float]:
    """Prints and gives microseconds of `decoding` without the `call` itself, and of reading its A and B once."""
    times = interleaved(decoding(), rounds, clock=time.thread_time)
    found = {name: 1e6 * spread(each).median / CALLS - call for name, each in times.items()}
    print(
        f"one token, width {DECODING}, weights in cache, inside the native call: "
        + ", ".join(f"{us:.1f} us with ranks {name}" for name, us in found.items())
    )
    read = cached_read(2 * sum(PAPER) * DECODING * 4)
    if read is None:
        print("no C++ compiler: reading A and B is not measured")
        return found
    found["reading A and B"] = 1e6 * spread([read() for _ in range(rounds)]).median
    ratio = max(found[name] for name in OPEN) / found["reading A and B"]
    print(
        f"reading A and B once from cache: {found['reading A and B']:.1f} us; {ratio:.2f} times that, 1.5 wanted"
    )
    return found


def main(json_file: str | None, rounds: int) -> None:
    status = backends()["cpu"]
    if not status.available:
        print(f"cpu cannot run here: {status.reason}")
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # one token is one thread's work
    try:
        about = machine()
        times = interleaved(calls(), rounds, clock=time.thread_time)
        rows = {name: spread([1e6 * t / CALLS for t in each]) for name, each in times.items()}
        print(f"cpu on {headline(about)}; microseconds a call, median and quartiles")
        for name, row in rows.items():
            print(f"  {name:36} {row}")
        inside = report_decoding(rounds, rows["native call"].median)
    finally:
        torch.set_num_threads(threads)
    overhead = {name: rows[name].median - rows["native call"].median for name in LIMITS}
    for name, limit in LIMITS.items():
        print(f"overhead {name}: {overhead[name]:.1f} us, at most {limit:.0f} wanted")
    if json_file:
        table = {name: row._asdict() for name, row in rows.items()}
        write_json(
            json_file,
            {
                "benchmark": "overhead",
                **about,
                "microseconds": table,
                "overhead": overhead,
                "decoding": inside,
            },
        )
