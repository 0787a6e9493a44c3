"""`rode reproduce`: run what a table or figure of the paper wants, and show it beside the paper's numbers."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers

if TYPE_CHECKING:
    from typing import Unpack

    from rode.paper.tables import Tables

DESCRIPTION = """\
Train and evaluate what a table or figure of the paper (arXiv 2407.12730) names, and show our numbers beside the paper's.

WHAT: table2 to table6, fig6 (router outputs by block), fig7 (bars of three routers), fig8 (parameters against metrics); or a
config file, for a table of the variants in its sweep (docs/training.md), without numbers of the paper.
Each variant with each seed is a run of its own; what is finished stays, what was stopped goes on, and tables share runs.
A row that was not run is empty. Results: RESULTS/BASE/VARIANT/seed-N.json, the table or figure beside them.

examples:
  rode reproduce table2 model.path=DIR --seeds 0 1 2
  rode reproduce table5 --base configs/own-records.yaml --only relu-8888 softmax-8888
  rode reproduce table5 --base configs/own-records.yaml --no-run
  rode reproduce configs/questions/ranks.yaml --only ranks-30 ranks-2-4-8-16
  rode reproduce fig7 --launcher "accelerate launch --num_processes 4"
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    sub = commands.add_parser(
        "reproduce",
        help="the paper's tables and figures from runs of our own",
        description=DESCRIPTION,
        **options,
    )
    sub.set_defaults(run=run)
    sub.add_argument("what", metavar="WHAT", help="table2 ... table6, fig6, fig7, fig8, or a config file")
    sub.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="change every config: training.epochs=2"
    )
    sub.add_argument(
        "--configs",
        default="configs/paper",
        metavar="DIR",
        help="variants and tables.yaml (default configs/paper)",
    )
    sub.add_argument("--base", metavar="CONFIG", help="another model and data below the variants")
    sub.add_argument(
        "--seeds",
        nargs="+",
        metavar="N",
        help="run these (default 0), show all there are; with --no-run show these",
    )
    sub.add_argument("--only", nargs="+", metavar="VARIANT", help="run only these; all are shown")
    sub.add_argument("--no-run", action="store_true", help="show what is there")
    sub.add_argument("--results", default="results", metavar="DIR", help="default results")
    sub.add_argument(
        "--runs", default="runs/reproduce", metavar="DIR", help="adapters and logs (default runs/reproduce)"
    )
    sub.add_argument("--launcher", metavar="COMMAND", help="starts each training: COMMAND -m rode train ...")


def _split(args: argparse.Namespace, name: str) -> list[str]:
    """An option's words; overrides that stand after it are argparse's mistake, and go where they belong."""
    words = getattr(args, name) or []
    args.overrides = [*args.overrides, *(word for word in words if "=" in word)]
    return list(dict.fromkeys(word for word in words if "=" not in word))


def _seeds(words: Sequence[str]) -> list[int]:
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"--seeds: expected whole numbers of at least 0, got {word!r}")
    return list(map(int, words))


def _only(words: Sequence[str], known: Sequence[str], what: str) -> list[str]:
    from rode_food.settings import did_you_mean

    for word in words:
        if word not in known:
            raise ValueError(f"--only: {word!r} is no variant of {what}; {did_you_mean(word, known)}")
    return list(words) or list(known)


def _launcher(text: str | None) -> list[str]:
    words = shlex.split(text or "")
    if words and shutil.which(words[0]) is None:
        raise ValueError(f"--launcher: expected a command that can be run, got {words[0]!r}")
    return words


def _base_name(base: Path) -> str:
    from rode.training.config import ConfigError, experiment_values

    name = experiment_values(base).get("name")
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ConfigError(f"{base}: name: expected text that can name a folder, got {name!r}")
    return name


def run(args: argparse.Namespace) -> int:
    """The exit code: 1 if a run failed."""
    from rode.paper.tables import own_table, read_tables

    seeds, only = _seeds(_split(args, "seeds")), _split(args, "only")
    if args.what.endswith(".yaml"):
        tables = own_table(Path(args.what))
        (args.what,) = tables.items
    else:
        tables = read_tables(Path(args.configs))
    item = tables.item(args.what)
    only = _only(only, item.variants, args.what)
    base = Path(args.base) if args.base else tables.base(item)
    base_name = _base_name(base)
    failed = [] if args.no_run else _run_all(args, tables, only, seeds or [0], base, base_name)
    _show(args, tables, (seeds or None) if args.no_run else None, base_name)
    for line in failed:
        print(f"rode: {line}", file=sys.stderr)
    if failed:
        print("rode: the same command tries again, and goes on where there is a checkpoint", file=sys.stderr)
    return 1 if failed else 0


def _run_all(
    args: argparse.Namespace,
    tables: Tables,
    variants: Sequence[str],
    seeds: Sequence[int],
    base: Path,
    base_name: str,
) -> list[str]:
    """A line for each run that failed."""
    from rode.paper.runs import RunFailed, call, carry_out, plan

    launcher = _launcher(args.launcher)
    runs = plan(
        tables,
        variants,
        seeds,
        base=base,
        base_name=base_name,
        overrides=args.overrides,
        results=Path(args.results),
        runs=Path(args.runs),
    )
    failed = []
    for number, planned in enumerate(runs, start=1):
        state = planned.state
        print(f"== {planned} ({number} of {len(runs)}): {state}", flush=True)
        try:
            carry_out(planned, launcher=launcher, quiet=args.quiet, call=call)
        except RunFailed as error:
            failed.append(str(error))
            print(f"   {error}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"{planned} is stopped; the same command goes on from here", file=sys.stderr)
            raise
    return failed


def _show(args: argparse.Namespace, tables: Tables, seeds: Sequence[int] | None, base_name: str) -> None:
    """Print and write the report, and draw the figure if it is one."""
    from rode.paper.report import format_report, make_report, write_report
    from rode.paper.results import read_results

    item, folder = tables.item(args.what), Path(args.results) / base_name
    results = read_results(Path(args.results), base_name, item.variants, seeds)
    if item.kind == "comparisons":
        from rode.paper.forest import show

        text, paths = show(tables, args.what, results, Path(args.results), base_name)
        print(f"\n{text}\n")
        print("\n".join(map(str, paths)))
        return
    papers_data = base_name == _base_name(tables.base(item))
    report = make_report(tables, args.what, results, base_name, papers_data=papers_data)
    print(f"\n{format_report(report)}\n")
    paths = write_report(report, results, folder)
    if item.kind != "table":
        from rode.paper.figures import draw, save

        figure = draw(report, results, tables)
        if figure is not None:
            paths.append(save(figure, folder, args.what))
    print("\n".join(map(str, paths)))
