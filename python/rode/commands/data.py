"""`rode data`."""

from __future__ import annotations

import argparse
from typing import Any

from rode.commands import data_build

DESCRIPTION = """\
Turn published data sets into records (docs/records.md).

example:
  rode data convert food-photos PHOTOS_DIR records.jsonl --on-bad-image skip
"""


def add_parser(commands: Any, **options: Any) -> None:
    sub = commands.add_parser(
        "data",
        help="turn data sets into records",
        description=DESCRIPTION,
        formatter_class=options["formatter_class"],
    )
    data = sub.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    from rode.data.convert import DEFAULT_FRACTIONS
    from rode.data.readers import READERS

    sub = data.add_parser("convert", help="write a JSONL file of records", parents=options["parents"])
    sub.set_defaults(run=run)
    sub.add_argument("kind", choices=sorted(READERS), help="layout of the data")
    sub.add_argument("source", metavar="DIR", help="folder of the data")
    sub.add_argument("out", metavar="JSONL", help="file to write")
    sub.add_argument("--on-bad-image", choices=("error", "skip"), default="error", help="default error")
    for split, share in DEFAULT_FRACTIONS.items():
        sub.add_argument(f"--{split}", type=float, default=share, metavar="SHARE", help=f"default {share}")
    sub.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    data_build.add_parser(data, **options)


def run(args: argparse.Namespace) -> int:
    from rode.data.convert import DEFAULT_FRACTIONS, convert

    fractions = {split: getattr(args, split) for split in DEFAULT_FRACTIONS}
    print(
        convert(
            args.kind,
            args.source,
            args.out,
            fractions=fractions,
            seed=args.seed,
            on_bad_image=args.on_bad_image,
        )
    )
    return 0
