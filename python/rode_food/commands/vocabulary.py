"""`rode data vocabulary`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers, positive

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
Which names of ingredients mean the same, and which are common enough to count: InverseCooking's protocol, on the training
split alone (docs/vocabulary.md). Evaluation normalises answers and truths with it: evaluation.vocabulary=OUT.json in a
recipe, or `rode evaluate --vocabulary OUT.json`.
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    """Adds `vocabulary` to the commands of `rode data`."""
    sub = commands.add_parser(
        "vocabulary", help="build the vocabulary of ingredients", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("records", metavar="JSONL", help="file of records, each with a split")
    sub.add_argument("out", metavar="JSON", help="file to write")
    sub.add_argument(
        "--min-count", type=positive, default=10, metavar="N", help="fewest mentions to keep (default 10)"
    )
    sub.add_argument(
        "--all-records",
        action="store_true",
        help="count training records of any number of ingredients and instructions, or none",
    )


def run(args: argparse.Namespace) -> int:
    from rode_food.records import read_records
    from rode_food.vocabulary import Limits, Vocabulary, count_names, coverage

    limits = None if args.all_records else Limits()
    counts = count_names(read_records(args.records), limits)
    vocabulary = Vocabulary.from_counts(counts, min_count=args.min_count, limits=limits)
    vocabulary.save(args.out)
    print(
        f"{vocabulary.name}; of {len(counts.counted)} names in {counts.within} of {counts.records['train']} training records"
    )
    for split, known in coverage(vocabulary, counts).items():
        if known.mentions_known is None or known.names_known is None:
            print(f"{split}: {known.records} records, no ingredients")
            continue
        print(
            f"{split}: {known.records} records; knows {100 * known.mentions_known:.1f} % of {known.mentions} mentions, "
            f"{100 * known.names_known:.1f} % of {known.names} names"
        )
    print(f"vocabulary in {args.out}")
    return 0
