"""`rode generate`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from rode.commands.options import load, model_options, routes
from rode_food.commands.options import ParserOptions, Subparsers
from rode_food.tasks import TASKS

if TYPE_CHECKING:
    from typing import Unpack

DESCRIPTION = """\
Answer a question about a picture.

An adapter that `rode train` wrote remembers its model and prompt; --model and --prompt override them.

examples:
  rode generate --adapter runs/own-records --image soup.jpg --task ingredients
  rode generate --model DIR --image a.jpg b.jpg --question "Is this dish spicy?" --json
"""


def add_parser(commands: Subparsers, **options: Unpack[ParserOptions]) -> None:
    options["parents"] = [*options.get("parents", []), model_options()]
    sub = commands.add_parser(
        "generate", help="answer a question about a picture", description=DESCRIPTION, **options
    )
    sub.set_defaults(run=run)
    sub.add_argument("--image", nargs="+", required=True, metavar="FILE")
    what = sub.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", choices=TASKS)
    what.add_argument("--question", metavar="TEXT")
    sub.add_argument(
        "--as-task", choices=TASKS, help="with --question, for an adapter whose router reads the task"
    )
    sub.add_argument(
        "--json", action="store_true", help="one JSON object a line: image, question, answer, parsed"
    )


def run(args: argparse.Namespace) -> int:
    from rode.evaluation.generate import answer
    from rode.vlm import open_image
    from rode_food import parse_answer, question

    for image in args.image:  # before the model, which takes longer
        open_image(image)
    text = question(args.task) if args.task else args.question
    model, processor, prompt, source = load(args)
    task = args.task or args.as_task
    answers = answer(
        model,
        processor,
        args.image,
        [text] * len(args.image),
        prompt=prompt,
        max_new_tokens=args.max_new_tokens or 256,
        batch_size=args.batch_size or 8,
        tasks=[task] * len(args.image),
        source=source,
        routes=routes(args, model, processor),
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
