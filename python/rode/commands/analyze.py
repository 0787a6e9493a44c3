"""`rode analyze`: options, and the way from an adapter to its report."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode.commands.options import load, model_options, routes, saved_experiment
from rode_food.commands.options import ParserOptions, Subparsers, positive
from rode_food.tasks import ALL_TASKS

if TYPE_CHECKING:
    from typing import Unpack

    from rode.training.config import EvaluationConfig, Experiment
    from rode_food import Example

DESCRIPTION = """\
Run an adapter over held-out records and report what its router does: how far each expert opens, by block, task and kind of
token; which experts never do; which ones tasks share; how many a token uses (docs/analysis.md).

Writes analysis.json and report.html, prints a summary. Nothing is generated unless --answers generated asks for it.

examples:
  rode analyze runs/own-records
  rode analyze runs/own-records --limit 200 --against runs/softmax
  rode analyze runs/own-records --against untrained
  rode analyze ADAPTER_DIR --model DIR --data records.jsonl --split val --out analysis
"""

UNTRAINED = "untrained"


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    options["parents"] = [*options.get("parents", []), model_options(adapter=False)]
    sub = commands.add_parser(
        "analyze",
        help="what an adapter's router does on held-out records",
        description=DESCRIPTION,
        **options,
    )
    sub.set_defaults(run=run)
    sub.add_argument("adapter", metavar="ADAPTER", help="an output_dir or a checkpoint-N of `rode train`")
    sub.add_argument(
        "--data", metavar="JSONL", nargs="+", help="files of records (default: those of the adapter's config)"
    )
    sub.add_argument("--split", choices=("train", "val", "test"), help="default: the config's, else test")
    sub.add_argument("--tasks", nargs="+", choices=ALL_TASKS)
    sub.add_argument("--limit", type=positive, metavar="N", help="at most N examples of each source")
    sub.add_argument(
        "--on-bad-record",
        "--on-bad-image",
        choices=("error", "skip"),
        help="default: the config's, else error",
    )
    sub.add_argument(
        "--against",
        metavar="ADAPTER2",
        help="set another adapter's numbers beside this one's, such as softmax's; 'untrained' for this one before training",
    )
    sub.add_argument(
        "--answers",
        choices=("truth", "generated"),
        default="truth",
        help="what follows the prompt (default truth)",
    )
    sub.add_argument("--out", metavar="DIR", help="default: ADAPTER/analysis")


def run(args: argparse.Namespace) -> int:
    """The exit code."""
    from rode_food.html import require_matplotlib

    require_matplotlib()  # before the model, which takes longer
    from rode.evaluation.analysis.report import write_report
    from rode.evaluation.analysis.text import format_analysis

    experiment = saved_experiment(args.adapter)
    settings, examples, skipped = _examples(args, experiment)
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    analysis = _analysed(args, args.adapter, experiment, settings, examples)
    against = None
    if args.against:
        saved = None if args.against == UNTRAINED else saved_experiment(args.against)
        against = _analysed(args, args.against, saved or experiment, settings, examples)
    analysis = {"split": settings.split, "answers": args.answers, **analysis, "against": against}
    page = write_report(args.out or Path(args.adapter) / "analysis", analysis)
    print(format_analysis(analysis))
    print(f"\n{page}" + (f"; records left out: {len(skipped)}" if skipped else ""))
    return 0


def _examples(
    args: argparse.Namespace, experiment: Experiment | None
) -> tuple[EvaluationConfig, list[Example], list[str]]:
    """(evaluation settings, examples, one line for each record left out)."""
    from rode.evaluation.evaluate import evaluation_examples
    from rode.training.config import EvaluationConfig
    from rode.training.usable import drop_unusable
    from rode_food.source import Source

    if experiment is None and not args.data:
        raise ValueError(
            f"{args.adapter} has no config.yaml that names records: give --data records.jsonl (and --model DIR)"
        )
    settings = dataclasses.replace(experiment.evaluation) if experiment else EvaluationConfig()
    for name in ("split", "limit", "batch_size", "max_new_tokens"):
        if getattr(args, name):
            setattr(settings, name, getattr(args, name))
    sources = (
        [Source(path) for path in args.data]
        if args.data or experiment is None
        else [Source(**vars(s)) for s in experiment.data.sources]
    )
    if args.tasks:
        sources = [dataclasses.replace(source, tasks=args.tasks) for source in sources]
    examples = evaluation_examples(sources, settings.split, settings.limit)
    on_bad_record = args.on_bad_record or (experiment.data.on_bad_record if experiment else "error")
    return settings, *drop_unusable(examples, on_bad_record=on_bad_record)


def _analysed(
    args: argparse.Namespace,
    adapter: str,
    experiment: Experiment | None,
    settings: EvaluationConfig,
    examples: list[Example],
) -> dict[str, Any]:
    from rode.evaluation.analysis.measure import measure
    from rode.evaluation.analysis.numbers import summarise

    # A model of its own for each adapter: the other's may have another projector.
    chosen = copy.copy(args)
    chosen.adapter = None if adapter == UNTRAINED else adapter
    model, processor, prompt, source = load(chosen, experiment)
    if adapter == UNTRAINED:
        model = _untrained(model, args.adapter)
    measured = measure(
        model,
        processor,
        examples,
        prompt=prompt,
        batch_size=settings.batch_size,
        answers=args.answers,
        max_new_tokens=settings.max_new_tokens,
        source=source,
        routes=routes(args, model, processor),
        progress=not args.quiet,
    )
    return {"adapter": adapter, "gate": model.active_peft_config.gate, **summarise(measured)}


def _untrained(model: Any, adapter: str) -> Any:
    """The model with an adapter of the same configuration as it starts: what a random router does."""
    import torch
    from peft import get_peft_model

    from rode.tuner import RodeConfig

    config = RodeConfig.from_pretrained(adapter)
    config.inference_mode = False
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()
