"""`rode data statistics`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers, positive

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
What a file of records holds: our row of the paper's Table 1, Figure 3 (categories), lengths, nutrition, ingredients.

Writes statistics.json, table1.md, PNG files and statistics.html, which holds everything (docs/statistics.md).
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    """Adds `statistics` to the commands of `rode data`."""
    sub = commands.add_parser(
        "statistics", help="figures and tables of a file of records", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("records", metavar="JSONL", help="file of records")
    sub.add_argument("out", metavar="DIR", help="folder to write to")
    sub.add_argument("--name", help="of the data set (default: the records' sources)")
    sub.add_argument(
        "--figure3-top", type=positive, default=50, metavar="N", help="categories in Figure 3 (default 50)"
    )


def run(args: argparse.Namespace) -> int:
    from rode_food.html import require_matplotlib
    from rode_food.records import read_records
    from rode_food.statistics import collect
    from rode_food.statistics_page import table1, write_statistics

    require_matplotlib()  # before the records, which may be many
    statistics = collect(read_records(args.records))
    if not statistics["records"]:
        raise ValueError(f"{args.records}: no records in it")
    name = args.name or ", ".join(statistics["sources"])
    files = write_statistics(args.out, statistics, name=name, top=args.figure3_top)
    print(table1(statistics, name), end="")
    print(f"statistics in {files[-1]}")
    return 0
