"""`rode data audit-nutrition`, `rode data audit-matching` and `rode data review`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rode_food.atomic import write_json, write_text
from rode_food.commands.options import ParserOptions, Subparsers

if TYPE_CHECKING:
    from typing import Unpack

    from rode_food.records import FoodRecord

NUTRITION = """\
Compare labelled nutrition with USDA's tables, by food group (docs/golden.md).

example:
  rode data audit-nutrition records.jsonl --usda USDA_DIR --state served --html audit.html
"""
MATCHING = """\
Measure on lines labelled by hand how often an ingredient line finds its food and its grams (docs/golden.md).

example:
  rode data audit-matching FOOD_PHOTOS_DIR --usda USDA_DIR
"""
REVIEW = """\
Show the golden stage's samples in a browser, to accept or reject; every decision is written at once.

example:
  rode data review BUILD_DIR/golden
"""


def add_parser(data: Subparsers, **options: Unpack[ParserOptions]) -> None:
    """The three commands among those of `rode data`; options: formatter_class and parents."""
    from rode_food.unifood.golden.settings import GoldenSettings

    defaults = GoldenSettings()
    sub = data.add_parser(
        "audit-nutrition", help="compare labels with USDA's tables", description=NUTRITION, **options
    )
    sub.set_defaults(run=audit_nutrition)
    sub.add_argument("records", metavar="JSONL", help="labelled records")
    sub.add_argument("--usda", required=True, metavar="DIR", help="USDA's tables")
    sub.add_argument(
        "--state",
        choices=("recipe", "served"),
        default="recipe",
        help="names mean food as recipes use it, or as served: rice raw or boiled (default recipe)",
    )
    sub.add_argument("--automatic", action="store_true", help="trust automatic matches too")
    sub.add_argument("--split", choices=("train", "val", "test"), help="only this split")
    for name, kind in (
        ("tolerance", "share"),
        ("energy-floor", "kcal"),
        ("macro-floor", "g"),
        ("coverage", "share"),
    ):
        value = getattr(defaults, name.replace("-", "_"))
        sub.add_argument(
            f"--{name}", type=float, default=value, metavar=kind.upper(), help=f"default {value:g}"
        )
    sub.add_argument("--html", metavar="FILE", help="write a page too")
    sub.add_argument("--json", metavar="FILE", help="write the numbers too")

    sub = data.add_parser(
        "audit-matching", help="precision of foods and grams", description=MATCHING, **options
    )
    sub.set_defaults(run=audit_matching)
    sub.add_argument("recipes", metavar="DIR", help="recipes that the labels name")
    sub.add_argument("--usda", required=True, metavar="DIR", help="USDA's tables")
    sub.add_argument("--labels", metavar="CSV", help="other labels than the 100 that come along")
    sub.add_argument("--json", metavar="FILE", help="write the numbers too")

    sub = data.add_parser("review", help="accept or reject golden samples", description=REVIEW, **options)
    sub.set_defaults(run=review)
    sub.add_argument("folder", metavar="DIR", help="of the golden stage, with review.html")
    sub.add_argument("--port", type=int, default=0, help="default: any free one")
    sub.add_argument("--no-browser", action="store_true", help="only print the address")


def audit_nutrition(args: argparse.Namespace) -> int:
    from rode_food.progress import Progress
    from rode_food.records import read_records
    from rode_food.usda import Estimator, load_foods
    from rode_food.usda.audit import Audit
    from rode_food.usda.audit_report import audit_html, audit_text
    from rode_food.usda.compare import Limits

    limits = Limits(args.tolerance, args.energy_floor, args.macro_floor, args.coverage, None)
    audit = Audit(Estimator(load_foods(args.usda), args.state), limits, automatic=args.automatic)
    records: Iterable[FoodRecord] = Progress(
        read_records(args.records, split=args.split), desc="audit", unit="record", show=not args.quiet
    )
    result = audit.add_all(records).result()
    if args.json:
        write_json(args.json, result)
    if args.html:
        write_text(args.html, audit_html(result, f"{args.records}: labels and USDA's tables"))
    print(audit_text(result))
    return 0


def audit_matching(args: argparse.Namespace) -> int:
    from rode_food.usda import Estimator, load_foods
    from rode_food.usda.precision import measure, read_labels, report

    result = measure(read_labels(args.recipes, args.labels), Estimator(load_foods(args.usda)))
    if args.json:
        write_json(args.json, result)
    print(report(result))
    return 0


def review(args: argparse.Namespace) -> int:
    from rode_food.unifood.golden.server import serve

    serve(args.folder, port=args.port, browser=not args.no_browser)
    return 0
