"""The `rode` command. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage, 3 a value in training was not finite,
130 interrupted."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from rode.commands import analyze, compose, evaluate, fit_clusters, generate, plan, reproduce, serve, train
from rode.processes import tells
from rode_food.commands import data

# torch, transformers and peft are imported by the commands that need them.

TOP = """\
Fine-tune and run vision-language models for food with RoDE: rectified mixtures of LoRA experts of different ranks.

  rode data inspect DIR                                    what a source holds, and what is broken in it
  rode data convert food-photos PHOTOS_DIR records.jsonl   records from a published data set
  rode data build-unifood configs/build/unifood.yaml OUT   a labelled data set from sources of your own
  rode plan configs/own-records.yaml --device 24GB         what training will take, before it starts
  rode train configs/own-records.yaml model.path=DIR       train an adapter
  rode evaluate configs/own-records.yaml                   answers and metrics on held-out records
  rode generate --adapter runs/own-records --image a.jpg --task nutrition
  rode serve runs/own-records                              an OpenAI-compatible server
  rode analyze runs/own-records                            what its router does on held-out records
  rode reproduce table2                                    a table of the paper beside its numbers
"""


MODULES = (plan, train, evaluate, generate, serve, analyze, reproduce, compose, fit_clusters, data)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--quiet", action="store_true", help="say nothing but results, warnings and errors")
    parser = argparse.ArgumentParser("rode", description=TOP, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"rode {metadata.version('rode')}")
    parser.add_argument(
        "--print-completion",
        action=_Completion,
        choices=("bash", "zsh", "tcsh"),
        help="print a script that completes this command in a shell (pip install shtab)",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in MODULES:
        module.add_parser(commands, formatter_class=raw, parents=[common])
    commands.add_parser(
        "demo", help="build, train, evaluate and report a small model on drawn plates", add_help=False
    )
    return parser


class _Completion(argparse.Action):
    """Prints what a shell reads once: `eval "$(rode --print-completion bash)"`."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: object, values: Any, option: str | None = None
    ) -> None:
        try:
            import shtab
        except ImportError:
            parser.exit(1, "rode: --print-completion needs the package shtab: pip install shtab\n")
        print(shtab.complete(parser, values))
        parser.exit(0)


def _settle_output(quiet: bool) -> None:
    """What libraries show of their work while the command runs: nothing with --quiet, no bars where there is no terminal."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rode").setLevel(logging.WARNING if quiet else logging.INFO)
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault(
            "TQDM_DISABLE", "1"
        )  # of their bars; ours say so themselves (rode_food.progress)


def _parse(argv: list[str]) -> argparse.Namespace:
    """argparse gives overrides that stand after an option back as unknown, or to that option: put them right."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if (
        isinstance(getattr(args, "resume", False), str)
        and "=" in args.resume
        and not Path(args.resume).exists()
    ):
        args.resume, rest = True, [args.resume, *rest]
    stray = [
        word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")
    ]
    if stray:
        parser.error(f"unrecognized arguments: {' '.join(stray)}")
    if rest:
        args.overrides += rest
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code. argparse itself exits with 2 for wrong usage."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["demo"]:  # it has options of its own, and parts that only it needs
        run, debug = _demo, "--debug" in argv
        args: Any = argv[1:]
    else:
        args = _parse(argv)
        run, debug = args.run, args.debug
    _settle_output("--quiet" in argv)
    if not debug:  # what libraries plan to rename is no concern of whoever runs the command
        warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("rode: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `rode ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        code = 3 if isinstance(error, FloatingPointError) else 1
        if not tells(error):
            return code
        # Errors of ours say what to do; anything else is named by its type, and --debug shows where it came from.
        ours = isinstance(error, (ValueError, OSError, ImportError, FloatingPointError))
        text = "; ".join([str(error) or type(error).__name__, *getattr(error, "__notes__", [])])
        text = " ".join(text.split())
        print(
            f"rode: {text}" if ours else f"rode: {type(error).__name__}: {text} (--debug shows where)",
            file=sys.stderr,
        )
        return code


def _demo(argv: list[str]) -> int:
    from rode.demo.run import main as demo

    return demo([word for word in argv if word != "--debug"])
