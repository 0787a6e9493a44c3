"""`rode compose`: the command around `rode.baselines.lorahub`."""

from __future__ import annotations

import argparse
import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode.commands.options import load, model_options, saved_experiment
from rode_food.commands.options import ParserOptions, Subparsers, positive
from rode_food.tasks import ALL_TASKS

if TYPE_CHECKING:
    from typing import Unpack

    from rode.baselines.lorahub import Search
    from rode.training.config import Experiment
    from rode_food import Example

DESCRIPTION = """\
Make one plain-LoRA adapter of several (LoRAHub): their matrices are added up with coefficients that a search without
gradients finds on a few held-out examples. The adapters were trained with gate: none and the same rank; they stay as they are.

Writes the adapter and compose.json (coefficients, every evaluation) to --out, for `rode generate --adapter` and
`rode evaluate --adapter`.

examples:
  rode compose runs/lora-ingredients runs/lora-nutrition --out runs/composed --tasks recipe
  rode compose runs/a runs/b runs/c --out runs/abc --data new-task.jsonl --split train --examples 20 --budget 100
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    options["parents"] = [*options.get("parents", []), model_options(adapter=False, answers=False)]
    sub = commands.add_parser(
        "compose",
        help="one plain-LoRA adapter from several, by a few examples",
        description=DESCRIPTION,
        **options,
    )
    sub.set_defaults(run=run, adapter=None)
    sub.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="two or more folders that `rode train` wrote"
    )
    sub.add_argument("--out", required=True, metavar="DIR", help="folder to write; must not hold anything")
    sub.add_argument(
        "--data",
        metavar="JSONL",
        nargs="+",
        help="files of records; default: those of the first adapter's config",
    )
    sub.add_argument("--split", choices=("train", "val", "test"), default="val", help="default val")
    sub.add_argument("--tasks", nargs="+", choices=ALL_TASKS)
    sub.add_argument(
        "--examples", type=positive, default=5, metavar="N", help="drawn from the split (default 5)"
    )
    sub.add_argument(
        "--budget", type=positive, default=40, metavar="N", help="evaluations of the search (default 40)"
    )
    sub.add_argument("--seed", type=int, default=0, help="of the draw and of the search (default 0)")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    _check_usage(args, out)
    experiments = {
        adapter: found for adapter in args.adapters if (found := saved_experiment(adapter)) is not None
    }
    experiment = next(iter(experiments.values()), None)
    _check_experiments(args, experiments)
    examples = _draw_examples(args, experiment)

    from rode.baselines.lorahub import compose, few_shot_loss
    from rode.vlm import PixelSource, load_adapter
    from rode.vlm.families import family_of
    from rode.vlm.image_features import feature_source
    from rode.vlm.load import BASE_FILE

    for adapter in args.adapters:
        if (Path(adapter) / BASE_FILE).is_file():
            raise ValueError(
                f"{adapter}: expected adapters on one frozen base model, got one whose training changed it ({BASE_FILE})"
            )
    model, processor, prompt, source = load(args, experiment)
    # a picture goes through the frozen tower once, not once for each evaluation
    if isinstance(source, PixelSource) and family_of(model).stored_features is None:
        source = feature_source(model, processor, shape=source.shape)
    names = [f"source{i}" for i in range(len(args.adapters))]
    for name, adapter in zip(names, args.adapters, strict=True):
        model = load_adapter(model, adapter, name)
    loss = few_shot_loss(
        model, processor, examples, prompt=prompt, batch_size=args.batch_size or 8, source=source
    )
    alone = []
    for name in names:
        model.set_adapter(name)
        alone.append(loss())
    search = compose(model, names, loss, "default", budget=args.budget, seed=args.seed)
    _write(args, out, model, experiment, search, alone, [example.record_id for example in examples])
    for adapter, weight, single in zip(args.adapters, search.best.weights, alone, strict=True):
        print(f"{weight:+.4f}  {adapter} (alone: loss {single:.4f})")
    print(f"adapter in {out}: loss {search.best.loss:.4f} on {len(examples)} examples")
    return 0


def _check_usage(args: argparse.Namespace, out: Path) -> None:
    """Checks that are made before a model is loaded."""
    from peft import PeftConfig

    from rode.baselines.lorahub import check_composable

    if len(args.adapters) < 2:
        raise ValueError(f"expected two or more adapters to compose, got {args.adapters[0]} alone")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} holds something already: give another --out")
    for adapter in args.adapters:
        if not (Path(adapter) / "adapter_config.json").is_file():
            raise FileNotFoundError(f"{adapter}: no adapter here (adapter_config.json is missing)")
    check_composable({adapter: PeftConfig.from_pretrained(adapter) for adapter in args.adapters})
    try:
        import nevergrad  # noqa: F401  (the search needs it; better now than after the model is loaded)
    except ImportError as error:
        raise ImportError("rode compose searches with nevergrad: pip install 'rode[compose]'") from error


def _check_experiments(args: argparse.Namespace, experiments: dict[str, Experiment]) -> None:
    for key, option in (("path", "model"), ("projector", "projector"), ("prompt", "prompt")):
        values = {adapter: getattr(experiment.model, key) for adapter, experiment in experiments.items()}
        if getattr(args, option) is None and len(set(values.values())) > 1:
            text = ", ".join(f"{value} ({adapter})" for adapter, value in values.items())
            raise ValueError(
                f"the adapters were trained with different model.{key}: {text}; if they fit all the same, give --{option}"
            )


def _draw_examples(args: argparse.Namespace, experiment: Experiment | None) -> list[Example]:
    from rode.evaluation.evaluate import evaluation_examples
    from rode.training.usable import drop_unusable
    from rode_food.source import Source

    tasks = {"tasks": args.tasks} if args.tasks else {}
    if args.data:
        sources = [Source(path, **tasks) for path in args.data]
    elif experiment is not None:
        sources = [Source(**{**vars(source), **tasks}) for source in experiment.data.sources]
    else:
        raise ValueError("nothing to find coefficients on: give --data records.jsonl")
    found = evaluation_examples(sources, args.split)
    drawn = random.Random(args.seed).sample(found, min(args.examples, len(found)))
    return drop_unusable(drawn)[0]


def _write(
    args: argparse.Namespace,
    out: Path,
    model: Any,
    experiment: Experiment | None,
    search: Search,
    alone: list[float],
    records: list[str],
) -> None:
    """The folder, aside and then renamed."""
    import nevergrad
    import peft
    import torch
    import transformers

    import rode
    from rode.baselines.lorahub import BOUND, PENALTY
    from rode.training.config import dump_experiment
    from rode_food.atomic import write_json, write_text, written_aside

    found = {
        "adapters": args.adapters,
        "coefficients": search.best.weights,
        "loss": search.best.loss,
        "objective": search.best.objective,
        "losses_alone": alone,
        "bound": BOUND,
        "penalty": PENALTY,
        "budget": args.budget,
        "seed": args.seed,
        "optimizer": search.optimizer,
        "split": args.split,
        "records": records,
        "evaluations": [dataclasses.asdict(evaluation) for evaluation in search.evaluations],
        "versions": {m.__name__: m.__version__ for m in (rode, torch, transformers, peft, nevergrad)},
    }
    with written_aside(out) as aside:
        model.save_pretrained(str(aside), selected_adapters=["default"])
        write_json(aside / "compose.json", found)
        if experiment is not None:  # by which generate and evaluate find model and prompt
            given = {"path": args.model, "projector": args.projector, "prompt": args.prompt}
            config = dataclasses.replace(
                experiment.model, **{key: value for key, value in given.items() if value}
            )
            changed = dataclasses.replace(experiment, name=out.name, output_dir=str(out), model=config)
            note = "# The config of the first adapter given to `rode compose`; compose.json says how this one was made.\n"
            write_text(aside / "config.yaml", note + dump_experiment(changed))
