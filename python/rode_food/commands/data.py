"""`rode data`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rode_food.commands import audit as data_audit
from rode_food.commands import build as data_build
from rode_food.commands import export as data_export
from rode_food.commands import shard as data_shard
from rode_food.commands import statistics as data_statistics
from rode_food.commands import vocabulary as data_vocabulary
from rode_food.commands.options import ParserOptions, Subparsers

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
Turn published data sets into records (docs/records.md), and look into them first (docs/sources.md).

examples:
  rode data inspect RECIPE1M_DIR --images all
  rode data convert llava-instruct llava_v1_5_mix.json records.jsonl --image-folder IMAGES_DIR
  rode data convert recipe1m RECIPE1M_DIR records.jsonl --images-per-recipe 3 --on-bad-image skip
"""

MODULES = (data_vocabulary, data_statistics, data_audit, data_shard, data_export, data_build)


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    sub = commands.add_parser(
        "data",
        help="turn data sets into records",
        description=DESCRIPTION,
        formatter_class=options["formatter_class"],
    )
    data = sub.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_convert(data, options)
    _add_inspect(data, options)
    for module in MODULES:
        module.add_parser(data, **options)


def _kinds() -> str:
    from rode_food.readers import READERS

    return "kinds:\n" + "\n".join(f"  {kind:18} {reader.about}" for kind, reader in READERS.items())


def _add_convert(data: Subparsers, options: ParserOptions) -> None:
    from rode_food.convert import DEFAULT_FRACTIONS, LINE_READERS
    from rode_food.readers import READERS

    sub = data.add_parser(
        "convert",
        help="write a JSONL file of records",
        parents=options["parents"],
        epilog=_kinds(),
        formatter_class=options["formatter_class"],
    )
    sub.set_defaults(run=run_convert)
    sub.add_argument("kind", choices=sorted(READERS), metavar="KIND", help="layout of the data, see below")
    sub.add_argument("source", metavar="SOURCE", help="folder of the data, or the file")
    sub.add_argument("out", metavar="JSONL", help="file to write")
    sub.add_argument("--on-bad-image", choices=("error", "skip"), default="error", help="default error")
    sub.add_argument(
        "--strict",
        action="store_true",
        help="stop at the first broken entry instead of leaving it out and counting it",
    )
    for split, share in DEFAULT_FRACTIONS.items():
        sub.add_argument(f"--{split}", type=float, default=share, metavar="SHARE", help=f"default {share}")
    sub.add_argument("--seed", type=int, default=0, help="of the split (default 0)")
    sub.add_argument(
        "--lines",
        choices=LINE_READERS,
        default="library",
        help="what reads ingredient lines: library (ingredient-parser-nlp, the default) or simple, a hundred times as fast",
    )
    sub.add_argument(
        "--workers", type=int, metavar="N", help="processes that read lines; default: all processors"
    )
    _add_reader_options(sub)


def _add_inspect(data: Subparsers, options: ParserOptions) -> None:
    from rode_food.readers import READERS

    sub = data.add_parser(
        "inspect",
        help="count what is in a source, show samples, list what is broken",
        parents=options["parents"],
        epilog=_kinds(),
        formatter_class=options["formatter_class"],
    )
    sub.set_defaults(run=run_inspect)
    sub.add_argument("source", metavar="SOURCE", help="folder of the data, or a file of records")
    sub.add_argument("--kind", choices=sorted(READERS), metavar="KIND", help="default: by the files there")
    sub.add_argument("--samples", type=int, default=3, metavar="N", help="records to show (default 3)")
    sub.add_argument(
        "--images", type=_images, default=100, metavar="N|all", help="pictures to decode (default 100)"
    )
    sub.add_argument("--json", metavar="FILE", help="also write what was found there")
    sub.add_argument(
        "--strict", action="store_true", help="exit with 1 if an entry is broken or a decoded picture is bad"
    )
    _add_reader_options(sub)


def _images(text: str) -> int | str:
    if text == "all":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number or all, got {text!r}")
    return int(text)


def _add_reader_options(sub: argparse.ArgumentParser) -> None:
    from rode_food.readers import OPTIONS, READERS

    for name, option in OPTIONS.items():
        kinds = ", ".join(kind for kind, reader in READERS.items() if name in reader.options)
        flag, about = f"--{name.replace('_', '-')}", f"{option.about} ({kinds})"
        # absent unless given, so that a kind that does not take it can say so
        if isinstance(option.default, bool):
            sub.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=about)
        else:
            text = isinstance(option.default, str)
            sub.add_argument(
                flag,
                type=str if text else int,
                default=argparse.SUPPRESS,
                metavar="DIR" if text else "N",
                help=about if text else f"{about}; default {option.default}",
            )


def _reader_options(args: argparse.Namespace) -> dict[str, bool | int | str]:
    from rode_food.readers import OPTIONS

    return {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}


def run_convert(args: argparse.Namespace) -> int:
    from rode_food.convert import DEFAULT_FRACTIONS, convert
    from rode_food.readers.log import meanings

    fractions = {split: getattr(args, split) for split in DEFAULT_FRACTIONS}
    done = convert(
        args.kind,
        args.source,
        args.out,
        fractions=fractions,
        seed=args.seed,
        on_bad_image=args.on_bad_image,
        strict=args.strict,
        lines=args.lines,
        workers=args.workers,
        **_reader_options(args),
    )
    if explained := meanings(bool(done.left_out), bool(done.noted)):
        print(explained)
    print(done)
    return int(not done.written)


def run_inspect(args: argparse.Namespace) -> int:
    from rode_food.atomic import write_json
    from rode_food.inspect import inspect

    options: dict[str, Any] = _reader_options(args)
    found = inspect(args.source, args.kind, samples=args.samples, images=args.images, **options)
    print(found)
    if args.json:
        write_json(args.json, found.to_json())
    return int(not found.records or (args.strict and not found.sound))
