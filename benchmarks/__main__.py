"""`python -m benchmarks` lists what can be measured; `python -m benchmarks NAME [--json FILE]` measures it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

GPU_TOO = ("cpu", "cuda", "triton")


class Benchmark(NamedTuple):
    """What a name stands for.

    Attributes:
        about: a line. module: of this package. backends: whether one is chosen. rounds: how many by default, None for a count that
        needs none. run: (module, options).
    """

    about: str
    module: str
    backends: bool
    rounds: int | None
    run: Callable


BENCHMARKS = {
    "mixture": Benchmark(
        "time of the operation against plain PyTorch: forward, and with backward",
        "mixture",
        True,
        30,
        lambda m, o: m.main(o.backend, o.json, o.rounds),
    ),
    "decode": Benchmark(
        "time on 1 to 8 tokens, without and with a graph",
        "decode",
        True,
        15,
        lambda m, o: m.main(o.backend, o.json, o.rounds),
    ),
    "overhead": Benchmark(
        "time on one token outside the kernel, and where it goes",
        "overhead",
        False,
        200,
        lambda m, o: m.main(o.json, o.rounds),
    ),
    "block": Benchmark(
        "time of a training step of a Llama block, against the frozen block, PEFT's LoRA and X-LoRA",
        "block",
        False,
        10,
        lambda m, o: m.main("block", o.json, o.rounds),
    ),
    "memory": Benchmark(
        "bytes that the same step keeps for backward, and its peak; counted",
        "block",
        False,
        None,
        lambda m, o: m.main("memory", o.json),
    ),
    "presets": Benchmark(
        "parameters, memory and step time of every published system",
        "presets",
        False,
        20,
        lambda m, o: m.main(o.json, o.rounds),
    ),
    "traffic": Benchmark(
        "bytes that the GPU kernels move; counted", "traffic", False, None, lambda m, o: m.main(o.json)
    ),
    "roofline": Benchmark(
        "floors on devices that are not here; predicted", "roofline", False, None, lambda m, o: m.main(o.json)
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about)
        command.add_argument("--json", metavar="FILE", help="also write the table there")
        if benchmark.backends:
            command.add_argument("--backend", required=True, choices=GPU_TOO)
        if benchmark.rounds is not None:
            command.add_argument(
                "--rounds", type=int, default=benchmark.rounds, help=f"default {benchmark.rounds}"
            )
    options = parser.parse_args(arguments)
    if options.name is None:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:10} {benchmark.about}")
        return
    benchmark = BENCHMARKS[options.name]
    benchmark.run(importlib.import_module(f"benchmarks.{benchmark.module}"), options)


if __name__ == "__main__":
    sys.exit(main())
