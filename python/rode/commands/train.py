"""`rode train CONFIG`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from rode_food.commands.options import ParserOptions, Subparsers

if TYPE_CHECKING:
    from typing import Unpack

    from rode.training.config import Experiment

from rode.processes import is_main, leave_process_group

DESCRIPTION = """\
Train what a config says: an adapter, or (stage: projector) the module between tower and language model.

Writes to output_dir (runs/NAME): the adapter, config.yaml, history.json, tensorboard/ and checkpoint-N/ with adapter,
optimizer, scheduler and random state. Ctrl-C ends after the step under way and leaves a checkpoint to --resume from.

examples:
  rode train configs/own-records.yaml
  rode train configs/own-records.yaml training.max_steps=50 data.sources.0.path=my.jsonl
  rode train configs/own-records.yaml --resume
  rode train configs/own-records.yaml --resume auto training.max_minutes=110
  torchrun --nproc-per-node 4 -m rode train configs/unifood-rode-7b.yaml
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    sub = commands.add_parser(
        "train", help="train an adapter or a projector from a config", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("config", metavar="CONFIG", help="YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change the config: training.seed=1")
    sub.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a path from the latest; 'auto' begins anew where there is none",
    )

    sub.add_argument(
        "--check-space",
        action="store_true",
        help="print the space that checkpoints will need and what is free, and train nothing; exit code 1 where it is too little",
    )


def _check_space(experiment: Experiment) -> int:
    """Print the space on disk that a run needs, without reading weights."""
    from rode.training.disk import space_of
    from rode.training.meta_step import meta_model
    from rode.training.ready import check_inputs
    from rode.vlm.load import read_processor

    check_inputs(experiment, data=False)
    _, config = read_processor(experiment.model.path)
    model = meta_model(config, experiment)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    space = space_of(experiment.run_dir, trained, experiment.training.save_total_limit)
    print(f"{experiment.run_dir}: {trained:,} trained weights; {space}")
    return 0 if space.needed <= space.free else 1


def run(args: argparse.Namespace) -> int:
    from rode.training.config import load_experiment

    experiment = load_experiment(args.config, args.overrides)
    if args.check_space:
        return _check_space(experiment)
    from rode.training.train import train

    result = train(experiment, resume=args.resume, progress=not args.quiet)
    leave_process_group()
    if result.interrupted:
        print(
            f"stopped at step {result.metrics['steps']}; go on with --resume ({result.checkpoint})",
            file=sys.stderr,
        )
        return 130
    if not is_main():  # under torchrun one process speaks for all
        return 0
    if result.was_done:
        print(
            f"{result.output_dir} is done after {result.metrics['steps']} steps, and nothing was changed; to go on with it, raise "
            "training.max_steps or training.epochs"
        )
        return 0
    what = "projector" if experiment.stage == "projector" else "adapter"
    print(
        f"{what} in {result.output_dir}: {result.metrics['steps']} steps on {result.metrics['examples']} examples, "
        f"mean loss {result.metrics['train_loss']:.4f}"
    )
    for name in ("skipped_records", "truncated_answers"):
        if result.metrics[name]:
            print(f"{name}: {result.metrics[name]}")
    return 0
