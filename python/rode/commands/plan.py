"""`rode plan CONFIG`."""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers, positive

if TYPE_CHECKING:
    from typing import Unpack

    from rode.training.plan import Plan

DESCRIPTION = """\
Say before training what it takes: memory of a step, the largest micro-batch that fits a device, steps and time.

One step of the config is run on shapes alone (PyTorch's meta device): no weight is read, no GPU is needed, and nothing is
allocated. Of the model's folder config.json and the processor's files are read. docs/plan.md says what is assumed.

examples:
  rode plan configs/own-records.yaml --device 24GB
  rode plan configs/unifood-rode-7b.yaml --architecture llava-1.5-7b --device RTX4090 --examples 100000
  rode plan configs/own-records.yaml --device H100 --devices 2 training.batch_size=16 --json plan.json
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    sub = commands.add_parser(
        "plan", help="predict memory, batch and time of a training", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("config", metavar="CONFIG", help="YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change the config: training.seed=1")
    sub.add_argument("--device", metavar="NAME", help="a memory such as 24GB, or RTX4090, A100, H100, ...")
    sub.add_argument("--devices", type=positive, metavar="N", help="how many (default: training.devices)")
    sub.add_argument(
        "--architecture",
        choices=("llava-1.5-7b", "llava-1.5-13b"),
        help="plan for this published model in place of model.path, without any of its files",
    )
    sub.add_argument(
        "--tokens", type=positive, metavar="N", help="of the longest record (default: training.max_length)"
    )
    sub.add_argument(
        "--answer-tokens", type=positive, metavar="N", help="of its answer (default: all but the prompt)"
    )
    sub.add_argument(
        "--mean-tokens",
        type=positive,
        metavar="N",
        help="of a usual record, for the time (default: --tokens)",
    )
    sub.add_argument(
        "--picture", type=_size, default=(1024, 768), metavar="WxH", help="of pictures (default 1024x768)"
    )
    sub.add_argument(
        "--examples", type=positive, metavar="N", help="of an epoch (default: counted in data.sources)"
    )
    sub.add_argument("--json", metavar="FILE", help="write the plan there too")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    return positive(width), positive(height)


_size.__name__ = "size such as 1024x768"


def run(args: argparse.Namespace) -> int:
    from rode.training.config import load_experiment

    experiment = load_experiment(args.config, args.overrides)
    from transformers.utils import logging

    logging.set_verbosity_error()  # nothing is trained
    from rode.training.accelerators import find_accelerator
    from rode.training.meta_step import meta_model
    from rode.training.plan import make_plan
    from rode.training.plan_record import count_examples, model_config, record_to_plan

    accelerator = None if args.device is None else find_accelerator(args.device)
    config = model_config(experiment, args.architecture)
    record = record_to_plan(
        experiment,
        config,
        from_files=args.architecture is None,
        tokens=args.tokens,
        answer_tokens=args.answer_tokens,
        picture=args.picture,
    )
    plan = make_plan(
        experiment,
        meta_model(config, experiment),
        record,
        accelerator=accelerator,
        devices=args.devices,
        examples=args.examples or count_examples(experiment),
        mean_tokens=args.mean_tokens,
    )
    print(_page(plan, args.architecture or experiment.model.path))
    if args.json is not None:
        Path(args.json).write_text(json.dumps(plan.to_dict(), indent=1) + "\n", encoding="utf-8")
    return 0


def _page(plan: Plan, model: str) -> str:
    from rode.training.spread import gib

    on = "with" if plan.checkpointing else "without"
    lines = [
        f"{model} ({plan.model}): {plan.parameters / 1e6:,.1f} M weights, of which {plan.trained / 1e6:,.2f} M are trained",
        f"{plan.spread.devices} device(s), {plan.spread.words}; micro-batch {plan.micro_batch}, {on} gradient checkpointing",
        "",
        "memory of one device at its peak",
        *_rows(plan.memory),
        f"  {'sum':<34}{gib(plan.peak):>12}",
        "",
        "saved for the backward pass",
        *_rows(_runs(plan.saved)),
    ]
    if plan.accelerator is not None and plan.budget is not None:
        lines += [
            "",
            f"{plan.accelerator.name}: {gib(plan.accelerator.memory)}, {gib(plan.budget)} of them for tensors",
        ]
        for fit in plan.fits:
            how = "with" if fit.checkpointing else "without"
            most = (
                f"{fit.micro_batch} ({gib(fit.bytes)})"
                if fit.micro_batch
                else f"none (one record takes {gib(fit.bytes_of_one)})"
            )
            lines.append(f"  largest micro-batch {how} checkpointing: {most}")
        lines.append(f"  {plan.advice}")
    lines += ["", f"{plan.floating_point / 1e12:,.2f} TFLOP for an optimizer step on one device"]
    if plan.steps is None:
        lines.append("steps: not known; give --examples N, or training.max_steps")
    else:
        of = "" if plan.examples is None else f" ({plan.examples} examples an epoch)"
        lines.append(f"steps: {plan.steps}{of}")
    if plan.seconds is not None:
        shortest, longest = map(_time, plan.seconds)
        lines.append(f"time: {shortest} to {longest}, predicted")
    return "\n".join([*lines, "", "assumed:", *(f"  - {note}" for note in plan.notes)])


def _rows(table: dict[str, int]) -> list[str]:
    from rode.training.spread import gib

    return [f"  {name:<34}{gib(count):>12}" for name, count in table.items()]


def _runs(saved: dict[str, int]) -> dict[str, int]:
    """Layers in a row with the same bytes in one line."""
    rows: dict[str, int] = {}
    run: list[str] = []
    items = [*saved.items(), ("", -1)]
    for (name, count), (after, next_count) in pairwise(items):
        run.append(name.removeprefix("layer "))
        if name.startswith("layer ") and after.startswith("layer ") and count == next_count:
            continue
        rows[f"layers {run[0]} to {run[-1]}, each" if len(run) > 1 else name] = count
        run = []
    return rows


def _time(seconds: float) -> str:
    for name, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.1f} s"
