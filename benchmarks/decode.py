"""Decoding: the operation on 1 to 8 tokens, where calls cost more than products.

Inference without gradients and with them, K = O = 576 and 4096. Results are checked first, rounds are interleaved; each timing is a
run of calls, for one alone is too short for a clock.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import write_json
from benchmarks.mixture import PAPER, Problem, candidates, check
from benchmarks.timing import headline, interleaved, machine, ratios
from rode_kernels import backends

TOKENS = (1, 2, 4, 8)
WIDTHS = (576, 4096)
CALLS = 100


def repeated(call: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for _ in range(CALLS):
            call()

    return run


def main(backend: str, json_file: str | None, rounds: int) -> None:
    status = backends()[backend]
    device = "cpu" if backend in ("cpu", "reference") else "cuda"
    if not status.available or (device == "cuda" and not torch.cuda.is_available()):
        sizes = ", ".join(map(str, TOKENS))
        print(
            f"{backend} cannot run here: {status.reason}. On a machine where it can, this would time {sizes} tokens of width "
            f"{' and '.join(map(str, WIDTHS))}, float32 and bfloat16, without and with gradients"
        )
        return
    about = machine(device)
    print(
        f"{backend} on {headline(about)}; microseconds a call, and how many times faster than plain PyTorch"
    )
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for width in WIDTHS:
            for tokens in TOKENS:
                rows += run_case(backend, device, dtype, tokens, width, rounds)
    if json_file:
        write_json(json_file, {"benchmark": "decode", "backend": backend, **about, "rows": rows})


def run_case(
    backend: str, device: str, dtype: torch.dtype, tokens: int, width: int, rounds: int
) -> list[dict]:
    p = Problem.random((tokens, width, width, PAPER), dtype, device)
    runs, rows = candidates(p, backend), []
    for name, run in runs.items():
        check(p, run, name)
    for graph in (False, True):
        leaves = [t.detach().requires_grad_(graph) for t in p.leaves]
        calls = {name: repeated(lambda run=run, leaves=leaves: run(*leaves)) for name, run in runs.items()}
        with torch.set_grad_enabled(graph):
            times = interleaved(calls, rounds, device, warm_up=1)
        own = sorted(times[backend])[rounds // 2] / CALLS
        row = {"dtype": str(dtype), "width": width, "tokens": tokens, "graph": graph, "seconds": own}
        row |= {name: ratios(times, name, backend)._asdict() for name in runs if name != backend}
        rows.append(row)
        against = ", ".join(f"{ratios(times, name, backend)}x {name}" for name in runs if name != backend)
        what = "with graph" if graph else "inference"
        print(
            f"  {str(dtype)[6:]:9} width {width:5} tokens {tokens} {what:10} {1e6 * own:9.1f} us  {against}",
            flush=True,
        )
    return rows
