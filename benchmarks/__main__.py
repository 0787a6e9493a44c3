"""`python -m benchmarks traffic [--json FILE]`."""

from __future__ import annotations

import argparse
import sys

from benchmarks import traffic


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("traffic", help="bytes that the CUDA kernels move, counted on the emulator")
    one.add_argument("--json", metavar="FILE", help="also write the table there")
    options = parser.parse_args(arguments)
    traffic.main(options.json)


if __name__ == "__main__":
    sys.exit(main())
