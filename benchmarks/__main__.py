"""`python -m benchmarks` lists what can be measured; `python -m benchmarks NAME [--json FILE]` measures it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.cases import ON_BLOCK, ON_CPU, ON_GPU, PASSES

GPU_TOO = ("cpu", "cuda", "triton")
DTYPES = ("float32", "bfloat16", "float16")
Parser = argparse.ArgumentParser


def count(text: str) -> int:
    """An int of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {text}")
    return value


def fraction(text: str) -> float:
    """A number in [0, 1]."""
    value = float(text)
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a share in [0, 1], got {text}")
    return value


def to_json(command: Parser) -> None:
    command.add_argument("--json", metavar="FILE", help="also write the table there")


def rounds(default: int) -> Callable[[Parser], None]:
    return lambda command: command.add_argument(
        "--rounds", type=count, default=default, help=f"default {default}"
    )


def one_backend(command: Parser) -> None:
    command.add_argument("--backend", choices=GPU_TOO, help="default: a GPU's where one is, else cpu")


def of_mixture(command: Parser) -> None:
    add = command.add_argument
    add("--backend", nargs="+", choices=GPU_TOO, help="default: a GPU's where one is, else cpu")
    names = ", ".join(dict.fromkeys([*ON_CPU, *ON_GPU]))
    add("--cases", nargs="+", metavar="CASE", help=f"default: the device's; of {names}")
    add("--dtype", nargs="+", choices=DTYPES, default=DTYPES[:2], help="default: float32 bfloat16")
    add("--open", nargs="+", type=fraction, metavar="FRACTION", help="of gates; default: the case's")
    add("--pass", nargs="+", choices=PASSES, default=PASSES, dest="passes", help="default: all")
    add(
        "--no-compile", action="store_false", dest="compile", help="leave torch.compile out, which takes long"
    )


def of_block(command: Parser) -> None:
    add = command.add_argument
    add("--cases", nargs="+", metavar="CASE", help=f"of {', '.join(ON_BLOCK)}; default: all")
    add("--width", nargs="+", metavar="N", help="576, 4096 or both; default: both")
    add("--tokens", type=count, metavar="N", help="default 1024, on a GPU 8192")
    add("--dtype", nargs="+", choices=DTYPES[:2], help="of the block; default: both, on a GPU bfloat16")


def of_generate(command: Parser) -> None:
    add = command.add_argument
    add("--cases", nargs="+", metavar="CASE", help="demo, llama-4096 or both; default: both")
    add("--tokens", type=count, default=64, metavar="N", help="new ones; default 64")
    add("--dtype", nargs="+", choices=DTYPES[:2], default=DTYPES[:2], help="of the model; default: both")


def of_serve(command: Parser) -> None:
    add = command.add_argument
    add("--clients", nargs="+", type=count, default=[1, 4, 8, 16], metavar="N", help="default 1 4 8 16")
    add("--requests", type=count, default=16, metavar="N", help="of each row; default 16")
    add("--tokens", type=count, default=64, metavar="N", help="of each answer; default 64")
    add("--batch-size", type=count, default=8, metavar="N", help="of the server; default 8")
    add("--dtype", choices=DTYPES[:2], default="float32", help="of the model; default float32")


def of_plot(command: Parser) -> None:
    command.add_argument("results", metavar="RESULTS.json", help="what `mixture --json` wrote")
    command.add_argument("--out", default=".", metavar="FOLDER", help="for the SVG files; default: here")


def of_data(command: Parser) -> None:
    command.add_argument(
        "--recipes",
        nargs="+",
        type=count,
        default=[100_000, 1_000_000],
        metavar="N",
        help="default: 100000 1000000",
    )
    command.add_argument(
        "--folder", metavar="DIR", help="for the made-up data, which is removed; default: /tmp"
    )


def of_shards(command: Parser) -> None:
    add = command.add_argument
    add("--records", type=count, default=3000, metavar="N", help="default 3000")
    add("--shard-size", type=count, default=500, metavar="N", help="records of a shard; default 500")
    add("--window", type=count, default=4, metavar="N", help="shards shuffled together; default 4")
    add("--folder", metavar="DIR", help="for the made-up data, which is removed; default: /tmp")


def of_lines(command: Parser) -> None:
    add = command.add_argument
    add(
        "--folder",
        metavar="DIR",
        help="CSV files of labelled lines; default: ingredient_lines below RODE_DATA",
    )
    add(
        "--part",
        choices=("tune", "check", "all"),
        default="all",
        help="check: the tenth kept apart; default all",
    )
    add(
        "--readers", nargs="+", choices=("simple", "whole"), default=("simple", "whole"), help="default: both"
    )
    add("--unlabelled", action="store_true", help="also count what is lost of lines without a label")
    add("--errors", metavar="FILE", help="write the lines that the last reader gets wrong, tab-separated")


class Benchmark(NamedTuple):
    """The meaning of a name.

    Attributes:
        about: a line. module: of this package. options: each adds some to the command's parser. run: (module, options).
    """

    about: str
    module: str
    options: tuple[Callable[[Parser], object], ...]
    run: Callable


BENCHMARKS = {
    "mixture": Benchmark(
        "time of the operation against plain PyTorch, the frozen layer and the machine's roofline",
        "mixture",
        (of_mixture, rounds(20), to_json),
        lambda m, o: m.main(o),
    ),
    "plot": Benchmark(
        "pictures of what mixture measured: by open share, by tokens, over the frozen layer",
        "plot",
        (of_plot,),
        lambda m, o: m.main(o.results, o.out),
    ),
    "decode": Benchmark(
        "time on 1 to 8 tokens, without and with a graph",
        "decode",
        (one_backend, rounds(15), to_json),
        lambda m, o: m.main(o),
    ),
    "generate": Benchmark(
        "tokens a second of greedy decoding: the model alone, with PEFT's LoRA merged and beside it, with RoDE",
        "generate",
        (of_generate, rounds(10), to_json),
        lambda m, o: m.main(o),
    ),
    "serve": Benchmark(
        "requests and tokens a second and time to first token of `rode serve`, against generate in a loop",
        "serve",
        (of_serve, to_json),
        lambda m, o: m.main(o),
    ),
    "plans": Benchmark(
        "time of every plan of the CUDA forward pass that the planner compares",
        "plans",
        (rounds(15), to_json),
        lambda m, o: m.main(o),
    ),
    "overhead": Benchmark(
        "time on one token outside the kernel, and where it goes",
        "overhead",
        (rounds(200), to_json),
        lambda m, o: m.main(o.json, o.rounds),
    ),
    "block": Benchmark(
        "time of a training step of a Llama block, against the frozen block, PEFT's LoRA and X-LoRA",
        "block",
        (of_block, rounds(10), to_json),
        lambda m, o: m.main(o),
    ),
    "memory": Benchmark(
        "bytes that the same step keeps for backward, and its peak; counted",
        "block",
        (to_json,),
        lambda m, o: m.main_memory(o),
    ),
    "presets": Benchmark(
        "parameters, memory and step time of every published system",
        "presets",
        (rounds(20), to_json),
        lambda m, o: m.main(o.json, o.rounds),
    ),
    "data": Benchmark(
        "time and memory of reading a made-up Recipe1M, and of choosing from it",
        "data",
        (of_data, to_json),
        lambda m, o: m.main(o),
    ),
    "shards": Benchmark(
        "training samples a second out of shards, against loose files",
        "shards",
        (of_shards, rounds(7), to_json),
        lambda m, o: m.main(o),
    ),
    "lines": Benchmark(
        "ingredient lines: lost, amounts and names right, names with junk, by source",
        "lines",
        (of_lines, to_json),
        lambda m, o: m.main(o),
    ),
    "traffic": Benchmark(
        "bytes that the GPU kernels move; counted", "traffic", (to_json,), lambda m, o: m.main(o.json)
    ),
    "roofline": Benchmark(
        "floors on devices that are not here; predicted", "roofline", (to_json,), lambda m, o: m.main(o.json)
    ),
}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="name", metavar="NAME")
    for name, benchmark in BENCHMARKS.items():
        command = commands.add_parser(name, help=benchmark.about)
        for add in benchmark.options:
            add(command)
    options = parser.parse_args(arguments)
    if options.name is None:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:10} {benchmark.about}")
        return
    benchmark = BENCHMARKS[options.name]
    benchmark.run(importlib.import_module(f"benchmarks.{benchmark.module}"), options)


if __name__ == "__main__":
    sys.exit(main())
