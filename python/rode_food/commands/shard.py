"""`rode data shard` and `rode data verify-shards`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers
from rode_food.records import SPLITS

if TYPE_CHECKING:
    from typing import Unpack


def add_parser(data: Subparsers, **options: Unpack[ParserOptions]) -> None:
    """Add both to the subparsers of `rode data`."""
    sub = data.add_parser(
        "shard", help="put records and pictures into a few large files", parents=options["parents"]
    )
    sub.set_defaults(run=run)
    sub.add_argument("records", metavar="JSONL", help="file of records (docs/records.md)")
    sub.add_argument(
        "out", metavar="DIR", help="folder to write; a killed run is finished by the same command"
    )
    sub.add_argument(
        "--format", choices=("webdataset", "parquet"), default="webdataset", help="default webdataset"
    )
    sub.add_argument("--size", type=int, default=1000, metavar="N", help="records of a shard (default 1000)")
    sub.add_argument("--name", help="what the files' names begin with (default: the records file's)")
    sub.add_argument("--on-bad-image", choices=("error", "skip"), default="error", help="default error")
    sub.add_argument("--overwrite", action="store_true", help="replace shards of other records or settings")
    for split in SPLITS:
        sub.add_argument(
            f"--{split}", type=float, metavar="SHARE", help=f"{split}'s share of records that state no split"
        )
    sub = data.add_parser(
        "verify-shards", help="read every shard and compare its digest", parents=options["parents"]
    )
    sub.set_defaults(run=run_verify)
    sub.add_argument("folder", metavar="DIR", help="folder of shards")


def run(args: argparse.Namespace) -> int:
    from rode_food import read_records
    from rode_food.progress import Progress
    from rode_food.shards.write import write_shards

    shares = {split: getattr(args, split) for split in SPLITS if getattr(args, split) is not None}

    def spread(
        function: Callable[[list[str]], list[str]], parts: Iterable[tuple[str, list[str]]]
    ) -> Iterator[tuple[str, list[str]]]:
        for key, lines in Progress(list(parts), desc="shards", unit="shard", show=not args.quiet):
            yield key, function(lines)

    written = write_shards(
        read_records(args.records),
        args.out,
        name=args.name or Path(args.records).stem,
        format=args.format,
        size=args.size,
        on_bad_image=args.on_bad_image,
        split_fractions=shares or None,
        overwrite=args.overwrite,
        map=spread,
    )
    print(written)
    for id, reason in written.left_out[:5]:
        print(f"left out {id}: {reason}")
    if len(written.left_out) > 5:
        print(f"... and {len(written.left_out) - 5} more, named in index.json")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from rode_food.shards.index import open_shards

    shards = open_shards(args.folder)
    shards.verify()
    print(f"{args.folder}: {len(shards)} records in {len(shards.shards)} shards, all as written")
    return 0
