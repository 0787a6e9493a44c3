"""Records as LLaVA-instruct entries, or as rows with `messages`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rode_food.atomic import replacing
from rode_food.records import PICTURE_MARK, FoodRecord
from rode_food.tasks import ALL_TASKS, FREE_QUESTION, make_examples

Format = Literal["llava-instruct", "messages"]
FORMATS: tuple[str, ...] = get_args(Format)
Pairs = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Exported:
    """The outcome of `export`: entries written, questions in them, and records and questions that were left out by reason."""

    entries: int
    questions: int
    left_out: dict[str, int]

    def __str__(self) -> str:
        text = f"wrote {self.entries} entries with {self.questions} questions"
        left_out = ", ".join(f"{count} with {reason}" for reason, count in self.left_out.items())
        return f"{text}; left out {left_out}" if left_out else text


def export(
    records: Iterable[FoodRecord],
    out: str | os.PathLike[str],
    to: str,
    *,
    tasks: Sequence[str] = ALL_TASKS,
    wording: Literal["first", "all"] = "first",
) -> Exported:
    """Write the questions and answers of records in a format of others.

    A record's conversation is one entry with all its turns; each other question is an entry of its own, for it does not
    follow another one. Pictures are not copied: their paths are written relative to the folder of `out`.

    Args:
        records: as `read_records` gives them.
        out: the file: a JSON array for "llava-instruct", JSON lines for "messages".
        to: one of `FORMATS`.
        tasks: which questions.
        wording: "first", or "all" for an entry for each wording.

    Raises:
        ValueError: another format, task or wording.
    """
    if to not in FORMATS:
        raise ValueError(f"to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if wording not in ("first", "all"):
        raise ValueError(f"wording: expected first or all, got {wording!r}")
    out = Path(out)
    folder = out.resolve().parent
    entries = questions = 0
    left_out: Counter[str] = Counter()
    with replacing(out) as file:
        if to == "llava-instruct":
            file.write("[")
        for record in records:
            written = 0
            for id, pairs in _conversations(record, tasks, wording, left_out):
                line = json.dumps(_entry(record, id, pairs, folder, to), ensure_ascii=False)
                file.write(line + "\n" if to == "messages" else (",\n" if entries else "\n") + line)
                entries, questions, written = entries + 1, questions + len(pairs), written + 1
            left_out["no question"] += not written
        if to == "llava-instruct":
            file.write("\n]\n")
    return Exported(entries, questions, dict(+left_out))


def _conversations(
    record: FoodRecord, tasks: Sequence[str], wording: str, left_out: Counter[str]
) -> Iterator[tuple[str, Pairs]]:
    examples = make_examples(record, tasks, wording=wording)
    if record.conversation and FREE_QUESTION in tasks:
        yield record.id, [(turn.question, turn.answer) for turn in record.conversation]
    numbers: Counter[str] = Counter()
    for example in examples:
        if example.task == FREE_QUESTION:
            continue
        numbers[example.task] += 1
        if PICTURE_MARK in example.question + example.answer:
            left_out[f"{PICTURE_MARK} in a text"] += 1
            continue
        number = f"/{numbers[example.task]}" if wording == "all" else ""
        yield f"{record.id}/{example.task}{number}", [(example.question, example.answer)]


def _entry(record: FoodRecord, id: str, pairs: Pairs, folder: Path, to: str) -> dict[str, Any]:
    images = [Path(os.path.relpath(image, folder)).as_posix() for image in record.images]
    about = {"source": record.source, **({} if record.split is None else {"split": record.split})}
    if to == "messages":
        messages: list[dict[str, Any]] = []
        for number, (question, answer) in enumerate(pairs):
            marks = [] if number else [{"type": "image"}] * len(images)
            messages.append({"role": "user", "content": [*marks, {"type": "text", "text": question}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return {"id": id, "messages": messages, "images": images, **about}
    said = []
    for number, (question, answer) in enumerate(pairs):
        before = "" if number else f"{PICTURE_MARK}\n" * len(images)
        said += [{"from": "human", "value": before + question}, {"from": "gpt", "value": answer}]
    image = {} if not images else {"image": images[0] if len(images) == 1 else images}
    return {"id": id, **image, "conversations": said, **about}
