"""Decoding: the operation on 1 to 8 tokens, where calls cost more than products.

Inference without gradients and with them, K = O = 576 and 4096, the parameters in x's dtype and in float32; with gradients also
under dropout, as in training. Results are checked first, rounds are interleaved. Each timing is a run of calls, for one alone is
too short for a clock. Calls of a run take one copy of the tensors after the other: while a model decodes, no layer finds its
weights in cache either.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from benchmarks import write_json
from benchmarks.cases import DROPOUT
from benchmarks.problem import Problem, best_backend, check, device_of, forms, trained
from benchmarks.timing import dtype_name, headline, interleaved, machine, ratios, spread
from rode_kernels import backends

TOKENS = (1, 2, 4, 8)
WIDTHS = (576, 4096)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
"""The dtypes of x and of the parameters. Configs train the last pair: a bfloat16 base with adapters in float32."""
MODES = {"inference": (False, 0.0), "with graph": (True, 0.0), "dropout": (True, DROPOUT)}
"""Whether autograd records the call, and the probability of dropout."""
CALLS = 100


def repeated(run: Callable[..., object], arguments: list[list]) -> Callable[[], None]:
    """CALLS calls, each with the next of the arguments."""
    following = cycle(arguments)

    def calls() -> None:
        for _ in range(CALLS):
            run(*next(following))

    return calls


def main(options: Namespace) -> None:
    """`options` as `python -m benchmarks decode` has them."""
    backend = options.backend or best_backend()
    device = device_of(backend)
    if device is None:
        sizes = ", ".join(map(str, TOKENS))
        print(
            f"{backend} cannot run here: {backends()[backend].reason}. On a machine where it can, this would time {sizes} "
            f"tokens of width {' and '.join(map(str, WIDTHS))}, float32 and bfloat16, without and with gradients and "
            "with dropout"
        )
        return
    about = {"benchmark": "decode", "backend": backend, **machine(device), "rounds": options.rounds}
    print(
        f"{backend} on {headline(about)}; microseconds a call, and how many times as long plain PyTorch takes"
    )
    rows = []
    for dtype, of_parameters in DTYPES:
        for width in WIDTHS:
            for tokens in TOKENS:
                params_fp32 = of_parameters == torch.float32
                p = Problem.random(tokens, width, width, dtype, device, params_fp32=params_fp32)
                rows += run_case(backend, p, options.rounds)
    if options.json:
        write_json(options.json, {**about, "rows": rows})


def run_case(backend: str, p: Problem, rounds: int) -> list[dict[str, Any]]:
    """A row for each of `MODES`."""
    copies, rows = p.copies(), []
    device, (tokens, width) = p.x.device.type, p.x.shape
    for mode, (graph, dropout) in MODES.items():
        q = replace(p, dropout=dropout)
        all_forms = forms(q, [backend])
        check(q, all_forms)
        calls = {}
        for name, form in all_forms.items():
            leaves = [trained(form.leaves(c)) if graph else form.leaves(c) for c in copies]
            calls[name] = repeated(form.run, leaves)
        with torch.set_grad_enabled(graph):
            times = interleaved(calls, rounds, device, warm_up=1)
        own = spread([t / CALLS for t in times[backend]])
        row = {"dtype": dtype_name(p.x.dtype), "parameters": dtype_name(p.A.dtype), "width": width}
        row |= {"tokens": tokens, "graph": graph, "dropout": dropout}
        row |= {"open_share": p.open_share, "seconds": own._asdict()}
        against = {name: ratios(times, name, backend) for name in all_forms if name != backend}
        row["ratio"] = {name: ratio._asdict() for name, ratio in against.items()}
        rows.append(row)
        print(
            f"  {row['dtype']:9} parameters {row['parameters']:9} width {width:5} tokens {tokens} {mode:10} "
            f"{1e6 * own.median:9.1f} us  {', '.join(f'{ratio}x {name}' for name, ratio in against.items())}",
            flush=True,
        )
    return rows
