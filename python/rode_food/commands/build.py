"""`rode data build-unifood`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
Build Uni-Food, or a data set like it, from sources of your own: select, categorise, label nutrition with a vision model,
sum it up, check the test split against the USDA's tables, write shards and statistics. A run that was stopped, in whatever
way, goes on where it was; what is done and has not changed is not done again.

examples:
  rode data build-unifood configs/build/unifood.yaml data/unifood --stage select --stage categorise
  rode data build-unifood configs/build/unifood.yaml data/unifood --dry-run      what labelling would cost, after those two
  rode data build-unifood configs/build/unifood.yaml data/unifood label.budget=50

It exits with 3 if not all is labelled yet: the budget is reached, or batches are under way.
"""


UNFINISHED = 3
"""Exit code where nothing is wrong but not all is labelled: the budget is reached, or batches are under way."""


def add_parser(data: Subparsers, **options: Unpack[ParserOptions]) -> None:
    """Adds the command to the sub-parsers of `rode data`."""
    from rode_food.commands.options import positive
    from rode_food.unifood.build import STAGES
    from rode_food.unifood.engines import ENGINES

    sub = data.add_parser(
        "build-unifood",
        help="build a labelled data set from sources of your own",
        description=DESCRIPTION,
        formatter_class=options["formatter_class"],
        parents=options["parents"],
    )
    sub.set_defaults(run=run)
    sub.add_argument("settings", metavar="YAML", help="what to build from and how")
    sub.add_argument("out", metavar="DIR", help="folder of the build")
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as YAML: select.size=500")
    sub.add_argument(
        "--stage", action="append", choices=STAGES, metavar="NAME", help=f"only this one: {', '.join(STAGES)}"
    )
    sub.add_argument(
        "--engine", choices=ENGINES, default="local", help="for work on single records (default local)"
    )
    sub.add_argument(
        "--workers", type=positive, metavar="N", help="processes or Ray tasks (default: the processors)"
    )
    sub.add_argument(
        "--redo", action="store_true", help="run stages that are done; answers and decisions are kept"
    )
    sub.add_argument(
        "--dry-run", action="store_true", help="say what labelling (or another stage) would do and cost"
    )


def run(args: argparse.Namespace) -> int:
    from rode_food.readers.log import meanings
    from rode_food.unifood.build import STAGES, StageResult, build_unifood, load_settings
    from rode_food.unifood.engines import make_engine
    from rode_food.unifood.label.errors import LabelError, Unfinished

    explained: set[str] = set()

    def tell(result: StageResult) -> None:
        # words in which a report counts what it met are explained before their first use
        new = {word for word in ("left_out", "noted") if result.report.get(word)} - explained
        if new:
            print(meanings("left_out" in new, "noted" in new), flush=True)
            explained.update(new)
        print(result, flush=True)

    try:
        build_unifood(
            load_settings(args.settings, args.overrides),
            args.out,
            engine=make_engine(args.engine, args.workers),
            stages=args.stage or STAGES,
            redo=args.redo,
            dry_run=args.dry_run,
            progress=not args.quiet,
            tell=tell,
        )
    except Unfinished as error:
        print(f"rode: label: {error}", file=sys.stderr)
        return UNFINISHED
    except LabelError as error:
        raise ValueError(f"label: {error}") from error
    return 0
