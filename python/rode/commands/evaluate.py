"""`rode evaluate`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rode.commands.options import load, model_options, routes
from rode_food.commands.options import ParserOptions, Subparsers, positive
from rode_food.metrics.tokens import TOKENIZERS, choose_tokenizer
from rode_food.tasks import ALL_TASKS

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
Answer the questions of held-out records and score the answers.

Writes predictions.jsonl and metrics.json, prints the table. With --predictions nothing is generated: the metrics are
computed anew from the file.

examples:
  rode evaluate configs/own-records.yaml
  rode evaluate configs/own-records.yaml --untrained --out runs/own-records/before
  rode evaluate --model DIR --adapter runs/own-records --data records.jsonl --split test --tasks nutrition
  rode evaluate --predictions runs/own-records/evaluation/predictions.jsonl
  rode evaluate --predictions predictions.jsonl --vocabulary vocabulary.json --tokenizer zh
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    options["parents"] = [*options.get("parents", []), model_options()]
    sub = commands.add_parser(
        "evaluate", help="answers and metrics on held-out records", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file; in place of --model and --data")
    sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="change the config")
    sub.add_argument("--data", metavar="JSONL", nargs="+", help="files of records")
    sub.add_argument("--split", choices=("train", "val", "test"), help="default test")
    sub.add_argument("--tasks", nargs="+", choices=ALL_TASKS)
    sub.add_argument("--limit", type=positive, metavar="N", help="at most N examples of each source")
    sub.add_argument(
        "--out", metavar="DIR", help="default: OUTPUT_DIR/evaluation of the config, else ./evaluation"
    )
    sub.add_argument("--on-bad-record", "--on-bad-image", choices=("error", "skip"), help="default error")
    sub.add_argument("--untrained", action="store_true", help="the config's model before training")
    sub.add_argument("--predictions", metavar="JSONL", help="score these answers anew, without a model")
    sub.add_argument(
        "--vocabulary",
        metavar="JSON",
        help="file of `rode data vocabulary`: merge names of ingredients before they are compared (default: the config's)",
    )
    sub.add_argument(
        "--resume",
        action="store_true",
        help="go on with an evaluation that stopped in the output folder, if there is one",
    )
    sub.add_argument(
        "--tokenizer",
        choices=TOKENIZERS,
        help="of BLEU and ROUGE-L (default: the config's, which is auto: by the script of the true answers)",
    )


def run(args: argparse.Namespace) -> int:
    from rode.evaluation.evaluate import evaluate, format_scores, rescore
    from rode_food.vocabulary import Vocabulary

    if args.predictions:
        if args.config or args.model or args.adapter or args.data:
            raise ValueError(
                "--predictions is scored as it stands: leave out config, --model, --adapter and --data"
            )
        vocabulary = Vocabulary.load(args.vocabulary) if args.vocabulary else None
        print(format_scores(rescore(args.predictions, vocabulary, args.tokenizer or "auto")))
        return 0
    from rode.training.config import EvaluationConfig, load_experiment
    from rode_food.source import Source

    experiment = load_experiment(args.config, args.overrides) if args.config else None
    if experiment is None and not args.data:
        raise ValueError(
            "nothing to evaluate on: give a CONFIG, or --data records.jsonl with --model or --adapter"
        )
    settings = experiment.evaluation if experiment else EvaluationConfig()
    vocabulary_file = args.vocabulary or settings.vocabulary
    vocabulary = Vocabulary.load(vocabulary_file) if vocabulary_file else None
    if experiment and not args.untrained and not args.adapter and experiment.stage == "adapter":
        args.adapter = str(experiment.run_dir)
    if experiment and not args.untrained and not args.projector and experiment.stage == "projector":
        args.projector = str(experiment.run_dir)
    tasks = {"tasks": args.tasks} if args.tasks else {}
    if args.data or experiment is None:
        sources = [Source(path, **tasks) for path in args.data]
    else:
        sources = [Source(**{**vars(source), **tasks}) for source in experiment.data.sources]
    from rode.evaluation.evaluate import evaluation_examples
    from rode.training.usable import drop_unusable

    examples = evaluation_examples(sources, args.split or settings.split, args.limit or settings.limit)
    on_bad_record = args.on_bad_record or (experiment.data.on_bad_record if experiment else "error")
    examples, skipped = drop_unusable(examples, on_bad_record=on_bad_record)
    for line in skipped:
        print(f"left out: {line}", file=sys.stderr)
    tokenizer = args.tokenizer or settings.tokenizer
    if any(example.task in ("recipe", "question") for example in examples):
        choose_tokenizer((), tokenizer)  # what is missing is missed before the answers are generated
    model, processor, prompt, source = load(args, experiment, stored=True)
    default_out = (
        experiment.run_dir / ("untrained" if args.untrained else "evaluation")
        if experiment
        else Path("evaluation")
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
        source=source,
        routes=routes(args, model, processor),
        vocabulary=vocabulary,
        tokenizer=tokenizer,
        resume=args.resume,
        progress=not args.quiet,
    )
    print(format_scores(scores))
    print(f"predictions and metrics in {out}" + (f"; records left out: {len(skipped)}" if skipped else ""))
    return 0
