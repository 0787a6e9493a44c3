"""`python -m benchmarks traffic|roofline [--json FILE]`,
`python -m benchmarks mixture --backend NAME [--rounds N] [--json FILE]`,
`python -m benchmarks presets [--rounds N] [--json FILE]`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("traffic", help="bytes that the GPU kernels move, counted")
    three = commands.add_parser("roofline", help="floors on devices that are not here, predicted")
    two = commands.add_parser("mixture", help="time against plain PyTorch")
    two.add_argument("--backend", required=True, choices=("cpu", "cuda", "triton"))
    two.add_argument("--rounds", type=int, default=30)
    four = commands.add_parser("presets", help="parameters, memory and step time of every published system")
    four.add_argument("--rounds", type=int, default=20)
    for command in (one, two, three, four):
        command.add_argument("--json", metavar="FILE", help="also write the table there")
    options = parser.parse_args(arguments)
    if options.command == "traffic":
        from benchmarks import traffic

        traffic.main(options.json)
    elif options.command == "roofline":
        from benchmarks import roofline

        roofline.main(options.json)
    elif options.command == "presets":
        from benchmarks import presets

        presets.main(options.json, options.rounds)
    else:
        from benchmarks import mixture

        mixture.main(options.backend, options.json, options.rounds)


if __name__ == "__main__":
    sys.exit(main())
