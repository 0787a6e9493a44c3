"""`rode data export`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers
from rode_food.export import FORMATS
from rode_food.records import SPLITS
from rode_food.tasks import ALL_TASKS

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
Write the questions and answers of a file of records as LLaVA-instruct (a JSON array) or as rows with messages and images
(JSON lines), for other training programs (docs/interchange.md). Pictures stay where they are.

example:
  rode data export --to llava-instruct records.jsonl train.json --split train
"""


def add_parser(data: Subparsers, **options: Unpack[ParserOptions]) -> None:
    """Adds the command to the sub-parsers of `rode data`."""
    sub = data.add_parser(
        "export", help="write records in a format of others", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("records", metavar="RECORDS", help="file of records (docs/records.md)")
    sub.add_argument("out", metavar="OUT", help="file to write; pictures' paths are relative to its folder")
    sub.add_argument("--to", choices=FORMATS, required=True, help="the format")
    sub.add_argument("--split", choices=SPLITS, help="only records of this split (default: all)")
    sub.add_argument(
        "--tasks", nargs="+", choices=ALL_TASKS, default=ALL_TASKS, metavar="TASK", help="default: all"
    )
    sub.add_argument(
        "--wordings", choices=("first", "all"), default="first", help="of our own questions (default first)"
    )


def run(args: argparse.Namespace) -> int:
    from rode_food.export import export
    from rode_food.records import read_records

    records = read_records(args.records, split=args.split)
    print(export(records, args.out, args.to, tasks=args.tasks, wording=args.wordings))
    return 0
