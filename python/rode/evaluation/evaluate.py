"""`rode evaluate`: answers on held-out records, and metrics from the answers.

`predictions.jsonl` holds everything the metrics need, so that they can be computed anew without the model.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode_food import Example
from rode_food.atomic import write_json, write_text
from rode_food.data_mixture import load_examples
from rode_food.metrics import read_predictions, score
from rode_food.source import Source
from rode_food.text_table import text_table
from rode_food.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import ProcessorMixin

    from rode.training.side_inputs import Routes
    from rode.vlm.collator import PictureSource

logger = logging.getLogger(__name__)

Scores = dict[str, dict[str, Any]]


def evaluate(
    model: Any,
    processor: ProcessorMixin,
    examples: Sequence[Example],
    out_dir: str | os.PathLike[str],
    *,
    prompt: str = "auto",
    batch_size: int = 8,
    max_new_tokens: int = 256,
    source: PictureSource | None = None,
    routes: Routes | None = None,
    gate_statistics: bool = True,
    vocabulary: Vocabulary | None = None,
    tokenizer: str = "auto",
    resume: bool = False,
    progress: bool = True,
) -> Scores:
    """Ask every example's question and score the answers.

    Writes `predictions.jsonl` (a line for each example: id, source, task, question, image, answer, truth, reference)
    and `metrics.json` (what is returned) to `out_dir`; for an adapter with a router also `gates.json`, how far its
    gates opened (`rode.tuner.GateReport`).

    Args:
        model, processor, prompt, batch_size, max_new_tokens, source, routes, progress: see `rode.evaluation.generate.answer`.
        examples: at least one.
        gate_statistics: False does without gates.json, and without the counting.
        vocabulary: merges names of ingredients before they are compared; `predictions.jsonl` keeps them as they are.
        tokenizer: of BLEU and ROUGE-L; see `rode_food.metrics.score`.
        resume: go on with an evaluation that stopped in `out_dir`, if there is one; its answers and scores are then those of one
            that ran through.

    Returns:
        {"all" or source: {metric: value}}, see `rode_food.metrics.score`.

    Raises:
        FileExistsError, ValueError, BlockingIOError: see `rode.evaluation.unfinished.unfinished`.
    """
    from rode.evaluation.generate import answer
    from rode.evaluation.unfinished import questions_digest, unfinished, weights_digest
    from rode.tuner import GateStatistics

    if not examples:
        raise ValueError("examples: expected at least one to evaluate, got none")
    # Like with like: a batch decodes until its longest answer ends, and tasks differ most in that.
    order = sorted(range(len(examples)), key=lambda i: (examples[i].task, len(examples[i].question), i))
    config = getattr(model, "active_peft_config", None)
    routed = gate_statistics and getattr(config, "routed", False)
    run = {
        "questions": questions_digest([examples[i] for i in order]),
        "weights": weights_digest(model),
        "prompt": prompt,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    with (
        unfinished(out_dir, run, resume=resume, with_gates=routed) as kept,
        GateStatistics().attach(model) if routed else nullcontext() as statistics,
    ):
        if statistics is not None and kept.gates is not None:
            statistics.restore(kept.gates)
        if kept.answers:
            logger.info("going on after %d of %d answers", len(kept.answers), len(order))
        rest = order[len(kept.answers) :]
        answers = kept.answers + answer(
            model,
            processor,
            [examples[i].images for i in rest],
            [examples[i].question for i in rest],
            prompt=prompt,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            source=source,
            tasks=[examples[i].task for i in rest],
            routes=routes,
            progress=progress,
            on_batch=lambda texts: kept.add(texts, None if statistics is None else statistics.state()),
        )
        rows = _rows(examples, dict(zip(order, answers, strict=True)))
        if statistics is not None:
            write_json(Path(out_dir) / "gates.json", statistics.report().to_dict())
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        write_text(Path(out_dir) / "predictions.jsonl", "".join(lines))
    return _write_scores(Path(out_dir), score(rows, vocabulary, tokenizer))


def _rows(examples: Sequence[Example], answers: dict[int, str]) -> list[dict[str, Any]]:
    return [
        {
            "id": example.record_id,
            "source": example.source,
            "task": example.task,
            "question": example.question,
            "image": example.image,
            "answer": answers[i],
            "truth": example.answer,
            "reference": example.reference,
        }
        for i, example in enumerate(examples)
    ]


def evaluation_examples(sources: Iterable[Source], split: str, limit: int | None = None) -> list[Example]:
    """The questions of one split, each in its first wording, every source once whatever its weight.

    Args:
        sources: files of records.
        split: "train", "val" or "test".
        limit: the most examples of each file; they are the first records', all tasks alike.
    """
    examples: list[Example] = []
    for source in sources:
        found = load_examples([dataclasses.replace(source, weight=1.0)], split).examples
        examples += found[:limit]
    return examples


def rescore(
    predictions: str | os.PathLike[str], vocabulary: Vocabulary | None = None, tokenizer: str = "auto"
) -> Scores:
    """Metrics of a predictions file, written to `metrics.json` beside it. No model is needed.

    Args:
        vocabulary: merges names of ingredients before they are compared; None does not, whatever was done before.
        tokenizer: of BLEU and ROUGE-L; see `rode_food.metrics.score`.
    """
    path = Path(predictions)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such predictions file")
    rows = list(read_predictions(path))
    if not rows:
        raise ValueError(f"{path}: no predictions in it")
    return _write_scores(path.parent, score(rows, vocabulary, tokenizer))


def _write_scores(directory: Path, scores: Scores) -> Scores:
    write_json(directory / "metrics.json", scores)
    for name in ("sacrebleu_signature", "rouge_l_tokenizer", "question_rouge_l_tokenizer"):
        if name in scores["all"]:
            logger.info("%s", _said(name, scores, list(scores)))
    return scores


def format_scores(scores: Scores) -> str:
    """A table for the terminal: a line for each metric, a column for "all" and each source.

    A lone source is the same as "all" and gets no column of its own.
    """
    columns = ["all"] if len(scores) == 2 else list(scores)
    names = list(dict.fromkeys(name for column in columns for name in scores[column]))

    def cell(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    notes = [name for name in names if any(isinstance(scores[column].get(name), str) for column in columns)]
    table = [["", *columns]]
    table += [[n, *(cell(scores[column].get(n)) for column in columns)] for n in names if n not in notes]
    return "\n".join([text_table(table), *(_said(name, scores, columns) for name in notes)])


def _said(name: str, scores: Scores, columns: list[str]) -> str:
    """A line for a metric that is text: once where all columns agree, else what each says."""
    texts = {column: str(scores[column][name]) for column in columns if name in scores[column]}
    if len(set(texts.values())) == 1:
        return f"{name}: {next(iter(texts.values()))}"
    return f"{name}: " + ", ".join(f"{column} {text}" for column, text in texts.items())
