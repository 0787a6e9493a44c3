"""Held-out photographs with what was asked, what is true, and what the variants of `configs/photographs` answered.

`python -m rode.demo.cases DIR`, where DIR was made by `rode.demo.photographs`, reads the answers that `rode reproduce photographs`
kept, prints the cases in words and writes DIR/report.html with the pictures. Which cases are shown is decided by a hash of the
records' ids, so that nobody chose them by their answers; an object is shown once.
"""

from __future__ import annotations

import argparse
import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rode.demo.photographs import SOURCES
from rode.paper.answers import answers_path, read_answers
from rode.paper.results import result_path
from rode.vlm.images import open_image
from rode_food import Example
from rode_food.atomic import write_text
from rode_food.data_mixture import load_examples
from rode_food.html import image, page, table
from rode_food.source import Source
from rode_food.tasks import stable_hash

CASES = {"ingredients": 4, "nutrition": 4, "category": 2, "recipe": 2}
"""Task -> how many cases are shown."""
SIDE = 224
"""Longest side of a picture on the page, in pixels."""


@dataclass(frozen=True)
class Case:
    """One question about one photograph; `answers`: variant -> its answer."""

    example: Example
    answers: Mapping[str, str]


def chosen(folder: Path) -> list[Example]:
    """The held-out questions to show, by a hash of their records' ids; one for each object."""
    found: list[Example] = []
    shown: set[str] = set()
    for kind, (_, tasks) in SOURCES.items():
        for task in tasks:
            examples = load_examples([Source(str(folder / f"{kind}.jsonl"), tasks=[task])], "test").examples
            left = CASES[task]
            for example in sorted(examples, key=lambda e: stable_hash("cases", e.record_id)):
                group = example.record_id.partition("/")[0]
                if left and group not in shown:
                    shown.add(group)
                    found.append(example)
                    left -= 1
    return found


def answered(examples: Sequence[Example], results: Path, variants: Sequence[str], seed: int) -> list[Case]:
    """The examples with the answers of runs that were kept.

    Args:
        examples: questions.
        results: the folder of BASE, such as results/photographs.
        variants: names of runs.
        seed: of the runs.

    Raises:
        FileNotFoundError: a run is not there. ValueError: a run has no answer to a question, as one made from other records.
    """
    by_variant: dict[str, dict[tuple[str, str], str]] = {}
    for variant in variants:
        file = answers_path(result_path(results.parent, results.name, variant, seed))
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file; run `rode reproduce photographs --configs configs/photographs --only {variant} "
                f"--seeds {seed}` first"
            )
        by_variant[variant] = {(a.record, a.task): a.text for a in read_answers(file)}
    cases = []
    for example in examples:
        key = example.record_id, example.task
        for variant in variants:
            if key not in by_variant[variant]:
                raise ValueError(
                    f"{variant} seed {seed}: expected an answer about {key[0]} ({key[1]}), got none; it was made from other records"
                )
        cases.append(Case(example, {variant: by_variant[variant][key] for variant in variants}))
    return cases


def in_words(cases: Sequence[Case]) -> str:
    """Markdown: a block for each case."""
    lines = []
    for case in cases:
        example = case.example
        lines += [f"**{example.record_id}** ({example.source}): {example.question}", ""]
        for who, text in {"true": example.answer, **case.answers}.items():
            lines.append(f"- {who}: {textwrap.shorten(text, 300, placeholder=' ...') or '(nothing)'}")
        lines.append("")
    return "\n".join(lines)


def write_page(path: Path, cases: Sequence[Case]) -> Path:
    """A page with the pictures in it, written aside and then renamed."""
    sections = [
        "<h1>Held-out photographs</h1>",
        "<p>Chosen by a hash of the records' ids, before there were answers.</p>",
    ]
    for case in cases:
        example = case.example
        small = open_image(example.image).copy()
        small.thumbnail((SIDE, SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=90)
        cells = [["", example.question], ["true", example.answer], *map(list, case.answers.items())]
        shown = image(buffer.getvalue(), "image/jpeg", example.record_id) + table(cells, sentences=True)
        sections.append(f'<div class="row beside">{shown}</div>')
    write_text(path, page("Held-out photographs", sections))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m rode.demo.cases",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", metavar="DIR", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results/photographs"), metavar="DIR")
    parser.add_argument("--variants", nargs="+", default=["lora-8", "relu-2-4-8-16"], metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    cases = answered(chosen(args.folder), args.results, args.variants, args.seed)
    print(in_words(cases))
    print(write_page(args.folder / "report.html", cases))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
