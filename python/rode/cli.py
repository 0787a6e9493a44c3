"""The `rode` command. Exit codes: 0 done, 1 failed (one line says why), 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# torch, transformers and peft are imported by the commands that need them.

TOP = """\
Fine-tune and run LLaVA models for food with RoDE: rectified mixtures of LoRA experts of different ranks.

  rode data convert food-photos PHOTOS_DIR records.jsonl   records from a published data set
  rode train recipes/own-records.yaml model.path=DIR       train an adapter
  rode evaluate recipes/own-records.yaml                   answers and metrics on held-out records
  rode generate --adapter runs/own-records --image a.jpg --task nutrition
  rode reproduce table2                                    a table of the paper beside its numbers
"""

TRAIN = """\
Train what a recipe says: an adapter, or (stage: projector) LLaVA's projector.

Writes to output_dir (runs/NAME): the adapter, recipe.yaml, history.json, tensorboard/ and checkpoint-N/ with adapter,
optimizer, scheduler and random state. Ctrl-C ends after the step under way and leaves a checkpoint to --resume from.

examples:
  rode train recipes/own-records.yaml
  rode train recipes/own-records.yaml training.max_steps=50 data.sources.0.path=my.jsonl
  rode train recipes/own-records.yaml --resume
  torchrun --nproc-per-node 4 -m rode train recipes/unifood-rode-7b.yaml
"""

EVALUATE = """\
Answer the questions of held-out records and score the answers.

Writes predictions.jsonl and metrics.json, prints the table. With --predictions nothing is generated: the metrics are
computed anew from the file.

examples:
  rode evaluate recipes/own-records.yaml
  rode evaluate recipes/own-records.yaml --untrained --out runs/own-records/before
  rode evaluate --model DIR --adapter runs/own-records --data records.jsonl --split test --tasks nutrition
  rode evaluate --predictions runs/own-records/evaluation/predictions.jsonl
"""

GENERATE = """\
Answer a question about a picture.

An adapter that `rode train` wrote remembers its model and prompt; --model and --prompt override them.

examples:
  rode generate --adapter runs/own-records --image soup.jpg --task ingredients
  rode generate --model DIR --image a.jpg b.jpg --question "Is this dish spicy?" --json
"""

DATA = """\
Turn published data sets into records (docs/records.md).

example:
  rode data convert food-photos PHOTOS_DIR records.jsonl --on-bad-image skip
"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "number of at least 1"  # what argparse calls it in its message


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--quiet", action="store_true", help="no progress bars")

    parser = argparse.ArgumentParser("rode", description=TOP, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, about: str, text: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=text, formatter_class=raw, parents=[common])
        sub.set_defaults(run=run)
        return sub

    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", metavar="DIR", help="LLaVA checkpoint directory")
    model.add_argument(
        "--adapter", metavar="DIR", help="adapter: an output_dir or a checkpoint-N of `rode train`"
    )
    model.add_argument("--projector", metavar="PATH", help="projector.safetensors of stage 1, or its folder")
    model.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="of frozen weights")
    model.add_argument("--device", help="auto, cpu, cuda, cuda:1, ...")
    model.add_argument(
        "--prompt", choices=("vicuna", "chat_template", "auto"), help="as the adapter was trained"
    )
    model.add_argument("--max-new-tokens", type=_positive, metavar="N", help="longest answer (default 256)")
    model.add_argument("--batch-size", type=_positive, metavar="N", help="questions at a time (default 8)")

    sub = add("train", "train an adapter or a projector from a recipe", TRAIN, _train)
    sub.add_argument("recipe", metavar="RECIPE", help="YAML file")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change the recipe: training.seed=1")
    sub.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        metavar="CHECKPOINT",
        help="go on from a checkpoint; without a path from the latest",
    )

    sub = add("evaluate", "answers and metrics on held-out records", EVALUATE, _evaluate)
    for action in model._actions:
        sub._add_action(action)
    sub.add_argument("recipe", nargs="?", metavar="RECIPE", help="YAML file; in place of --model and --data")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change the recipe")
    sub.add_argument("--data", metavar="JSONL", nargs="+", help="files of records")
    sub.add_argument("--split", choices=("train", "val", "test"), help="default test")
    sub.add_argument("--tasks", nargs="+", choices=("ingredients", "recipe", "nutrition", "category"))
    sub.add_argument("--limit", type=_positive, metavar="N", help="at most N examples of each source")
    sub.add_argument(
        "--out", metavar="DIR", help="default: OUTPUT_DIR/evaluation of the recipe, else ./evaluation"
    )
    sub.add_argument("--on-bad-image", choices=("error", "skip"), help="default error")
    sub.add_argument("--untrained", action="store_true", help="the recipe's model before training")
    sub.add_argument("--predictions", metavar="JSONL", help="score these answers anew, without a model")

    sub = add("generate", "answer a question about a picture", GENERATE, _generate)
    for action in model._actions:
        sub._add_action(action)
    sub.add_argument("--image", nargs="+", required=True, metavar="FILE")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=("ingredients", "recipe", "nutrition", "category"))
    what.add_argument("--question", metavar="TEXT")
    sub.add_argument(
        "--json", action="store_true", help="one JSON object a line: image, question, answer, parsed"
    )

    from rode.reproduce.command import add_parser

    add_parser(add)
    sub = commands.add_parser(
        "data", help="turn data sets into records", description=DATA, formatter_class=raw
    )
    data = sub.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    from rode.data.convert import DEFAULT_FRACTIONS
    from rode.data.readers import READERS

    sub = data.add_parser("convert", help="write a JSONL file of records", parents=[common])
    sub.set_defaults(run=_convert)
    sub.add_argument("kind", choices=sorted(READERS), help="layout of the data")
    sub.add_argument("source", metavar="DIR", help="folder of the data")
    sub.add_argument("out", metavar="JSONL", help="file to write")
    sub.add_argument("--on-bad-image", choices=("error", "skip"), default="error", help="default error")
    for split, share in DEFAULT_FRACTIONS.items():
        sub.add_argument(f"--{split}", type=float, default=share, metavar="SHARE", help=f"default {share}")
    sub.add_argument("--seed", type=int, default=0, help="of the split (default 0)")

    commands.add_parser(
        "demo", help="build, train, evaluate and report a small model on drawn plates", add_help=False
    )
    return parser


def _train(args: argparse.Namespace) -> int:
    from rode.recipe import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    from rode.train import train

    result = train(recipe, resume=args.resume, progress=not args.quiet)
    if result.interrupted:
        print(
            f"interrupted at step {result.metrics['steps']}; go on with --resume ({result.checkpoint})",
            file=sys.stderr,
        )
        return 130
    if os.environ.get("RANK", "0") != "0":  # under torchrun one process speaks for all
        return 0
    what = "projector" if recipe.stage == "projector" else "adapter"
    print(
        f"{what} in {result.output_dir}: {result.metrics['steps']} steps on {result.metrics['examples']} examples, "
        f"mean loss {result.metrics['train_loss']:.4f}"
    )
    for name in ("skipped_records", "truncated_answers"):
        if result.metrics[name]:
            print(f"{name}: {result.metrics[name]}")
    return 0


def _saved_recipe(adapter: str | None) -> Any:
    """The recipe beside an adapter that `rode train` wrote (one folder up for a checkpoint), or None."""
    from rode.recipe import load_recipe

    if adapter is None:
        return None
    for folder in (Path(adapter), Path(adapter).parent):
        if (folder / "recipe.yaml").is_file():
            return load_recipe(folder / "recipe.yaml")
    return None


def _load(args: argparse.Namespace, recipe: Any = None) -> tuple[Any, Any, str]:
    """(model, processor, prompt style) that the options and the recipe name."""
    from rode.recipe import ModelConfig
    from rode.vlm import load_adapter, load_vlm

    recipe = recipe or _saved_recipe(args.adapter)
    if recipe is None and args.model is None:
        raise ValueError("no model: give --model DIR, or an --adapter that `rode train` wrote")
    config = recipe.model if recipe else ModelConfig(path=args.model)
    model, processor = load_vlm(
        args.model or config.path,
        dtype=args.dtype or config.dtype,
        device=args.device or config.device,
        attention=config.attention,
        projector=args.projector or config.projector,
    )
    if args.adapter:
        model = load_adapter(model, args.adapter)
    return model, processor, args.prompt or config.prompt


def _evaluate(args: argparse.Namespace) -> int:
    from rode.evaluate import evaluate, format_scores, rescore

    if args.predictions:
        if args.recipe or args.model or args.adapter or args.data:
            raise ValueError(
                "--predictions is scored as it stands: leave out recipe, --model, --adapter and --data"
            )
        print(format_scores(rescore(args.predictions)))
        return 0
    from rode.data.mixture import Source
    from rode.recipe import EvaluationConfig, load_recipe

    recipe = load_recipe(args.recipe, args.overrides) if args.recipe else None
    if recipe is None and not args.data:
        raise ValueError(
            "nothing to evaluate on: give a RECIPE, or --data records.jsonl with --model or --adapter"
        )
    settings = recipe.evaluation if recipe else EvaluationConfig()
    if recipe and not args.untrained and not args.adapter and recipe.stage == "adapter":
        args.adapter = str(recipe.run_dir)
    if recipe and not args.untrained and not args.projector and recipe.stage == "projector":
        args.projector = str(recipe.run_dir)
    if args.data:
        tasks = {"tasks": args.tasks} if args.tasks else {}
        sources = [Source(path, **tasks) for path in args.data]
    else:
        sources = [
            Source(**{**vars(s), **({"tasks": args.tasks} if args.tasks else {})})
            for s in recipe.data.sources
        ]
    from rode.evaluate import evaluation_examples
    from rode.vlm import drop_bad_images

    examples = evaluation_examples(sources, args.split or settings.split, args.limit or settings.limit)
    on_bad_image = args.on_bad_image or (recipe.data.on_bad_image if recipe else "error")
    examples, skipped = drop_bad_images(examples, on_bad_image)
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    model, processor, prompt = _load(args, recipe)
    default_out = (
        recipe.run_dir / ("untrained" if args.untrained else "evaluation") if recipe else Path("evaluation")
    )
    out = Path(args.out) if args.out else default_out
    scores = evaluate(
        model,
        processor,
        examples,
        out,
        prompt=prompt,
        batch_size=args.batch_size or settings.batch_size,
        max_new_tokens=args.max_new_tokens or settings.max_new_tokens,
        progress=not args.quiet,
    )
    print(format_scores(scores))
    print(f"predictions and metrics in {out}" + (f"; records left out: {len(skipped)}" if skipped else ""))
    return 0


def _generate(args: argparse.Namespace) -> int:
    from rode.data import parse_answer, question
    from rode.generate import answer
    from rode.vlm import open_image

    for image in args.image:  # before the model, which takes longer
        open_image(image)
    text = question(args.task) if args.task else args.question
    model, processor, prompt = _load(args)
    answers = answer(
        model,
        processor,
        args.image,
        [text] * len(args.image),
        prompt=prompt,
        max_new_tokens=args.max_new_tokens or 256,
        batch_size=args.batch_size or 8,
        progress=not args.quiet and len(args.image) > 1,
    )
    for image, reply in zip(args.image, answers, strict=True):
        if args.json:
            row = {"image": image, "question": text, "answer": reply}
            if args.task:
                row |= {"task": args.task, "parsed": parse_answer(args.task, reply)}
            print(json.dumps(row, ensure_ascii=False))
        else:
            print(reply if len(answers) == 1 else f"{image}: {reply}")
    return 0


def _convert(args: argparse.Namespace) -> int:
    from rode.data.convert import DEFAULT_FRACTIONS, convert

    fractions = {split: getattr(args, split) for split in DEFAULT_FRACTIONS}
    print(
        convert(
            args.kind,
            args.source,
            args.out,
            fractions=fractions,
            seed=args.seed,
            on_bad_image=args.on_bad_image,
        )
    )
    return 0


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
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("rode").setLevel(logging.INFO)
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
        # Errors of ours say what to do; anything else is named by its type, and --debug shows where it came from.
        ours = isinstance(error, (ValueError, OSError, ImportError))
        text = " ".join(str(error).split()) or type(error).__name__
        print(
            f"rode: {text}" if ours else f"rode: {type(error).__name__}: {text} (--debug shows where)",
            file=sys.stderr,
        )
        return 1


def _demo(argv: list[str]) -> int:
    from rode.demo.run import main as demo

    return demo([word for word in argv if word != "--debug"])
