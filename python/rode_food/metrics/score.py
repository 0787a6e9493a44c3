"""All metrics from `predictions.jsonl` alone: no model, no torch."""

from __future__ import annotations

import json
import logging
import math
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rode_food.metrics.ingredients import ingredient_iou
from rode_food.metrics.nutrition import pmae
from rode_food.metrics.text import rouge_l, sacrebleu, without_tokens
from rode_food.metrics.tokens import Tokenizer, choose_tokenizer
from rode_food.names import normalise_name
from rode_food.records import NUTRITION_FIELDS
from rode_food.tasks import ALL_TASKS, parse_answer
from rode_food.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
ROW_KEYS = ("id", "source", "task", "answer", "truth", "reference")


def read_predictions(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a predictions file.

    Raises:
        ValueError: for a line that is not a JSON object; names file and line.
    """
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected an object, got {line.strip()[:60]}")
            yield row


def category_accuracy(predicted: Iterable[str | None], true: Iterable[str]) -> float:
    """Percent of categories named exactly, after `normalise_name`; None counts as wrong."""
    hits = [
        normalise_name(answer or "") == normalise_name(truth)
        for answer, truth in zip(predicted, true, strict=True)
    ]
    if not hits:
        raise ValueError("predicted: expected at least one category, got none")
    return 100 * sum(hits) / len(hits)


def exact_answers(predicted: Iterable[str], true: Iterable[str]) -> float:
    """Percent of free answers that are the truth, but for case, white space, and composed or decomposed letters."""
    pairs = [
        [" ".join(unicodedata.normalize("NFC", text).split()).casefold() for text in pair]
        for pair in zip(predicted, true, strict=True)
    ]
    if not pairs:
        raise ValueError("predicted: expected at least one answer, got none")
    return 100 * sum(answer == truth for answer, truth in pairs) / len(pairs)


def score(
    rows: Iterable[Row], vocabulary: Vocabulary | None = None, tokenizer: str = "auto"
) -> dict[str, dict[str, float | str | None]]:
    """Every metric that the rows allow, for each source and for "all" together.

    Args:
        rows: {"id", "source", "task", "question", "answer" (the model's text), "truth" (the target text),
            "reference" (the structured truth of `rode_food.tasks.Example`)}; `question` is not read.
        vocabulary: by which names of ingredients are merged on both sides; see `ingredient_iou`.
        tokenizer: of BLEU and ROUGE-L, one of `rode_food.metrics.tokens.TOKENIZERS`; "auto" goes by the scripts of the references,
            for each source and task, and for all sources together.

    Returns:
        {source: {metric: value}}, "all" first. In percent, as in the paper's tables. By task:
        ingredients: `ingredient_iou` (over the whole set, primary), `ingredient_iou_mean` (per image), and with a
        vocabulary `ingredient_vocabulary` (its name, a string), `ingredient_coverage` (share of true names that it knows) and
        `n_ingredients_left_out` (images of whose true names it knows none: they count nowhere);
        recipe: `sacrebleu`, `sacrebleu_signature` (a string that names the tokenizer), `rouge_l`, `rouge_l_tokenizer` (a string),
        and where ROUGE-L's tokenizer sees no token in answers or references that are not blank, `rouge_l_without_tokens`: how many;
        there is a warning, too;
        nutrition: `pmae_mass`, `pmae_energy`, `pmae_fat`, `pmae_protein`, `pmae_carb`, `pmae` (their mean),
        `parse_rate`, `pmae_parsed` (over the parsed answers; None if there are none);
        category: `category_accuracy`;
        question: `question_exact`, `question_rouge_l`, and as for recipes `question_rouge_l_tokenizer` and
        `question_rouge_l_without_tokens`;
        and `n_<task>`, the number of answers. See `rode_food.metrics.nutrition.pmae` for unparsed answers.

    Raises:
        ValueError: for a row that lacks a key, has an unknown task, an answer that is no text or a truth that its task's metric
            cannot compare with (nutrition: a negative or not finite number; null is unknown), or whose source is named "all".
        ImportError: if there are rows of recipes or questions and `rode[metrics]`, or what the tokenizer needs, is not installed.
    """
    groups: dict[str, list[Row]] = {"all": []}
    for number, row in enumerate(rows, start=1):
        missing = [key for key in ROW_KEYS if key not in row]
        if missing:
            raise ValueError(f"prediction {number}: missing {', '.join(missing)}")
        if row["task"] not in ALL_TASKS:
            raise ValueError(
                f"prediction {number}: task: expected one of {', '.join(ALL_TASKS)}, got {row['task']!r}"
            )
        if not isinstance(row["answer"], str):
            raise ValueError(f"prediction {number}: answer: expected text, got {row['answer']!r}")
        if row["source"] == "all":
            raise ValueError(
                f'prediction {number}: source: "all" stands for the sum of all; rename the source'
            )
        _check_truth(number, row)
        groups["all"].append(row)
        groups.setdefault(row["source"], []).append(row)
    return {name: _score(name, group, vocabulary, tokenizer) for name, group in groups.items()}


_NUTRITION = "a mapping of numbers of at least 0, or null where one is unknown"


def _check_truth(number: int, row: Row) -> None:
    """Raises ValueError for a truth that its task's metric cannot compare with."""
    task, reference = row["task"], row["reference"]
    key, found, wanted = "reference", reference, ""
    if task == "ingredients":
        if not isinstance(reference, list) or not all(isinstance(name, str) for name in reference):
            wanted = "a list of names"
    elif task == "nutrition":
        if not isinstance(reference, dict):
            wanted = _NUTRITION
        else:
            for name in NUTRITION_FIELDS:
                value = reference.get(name)
                number_like = isinstance(value, int | float) and not isinstance(value, bool)
                if value is not None and not (number_like and math.isfinite(value) and value >= 0):
                    wanted, key, found = "a number of at least 0, or null", f"reference: {name}", value
    elif task == "category":
        if not isinstance(reference, str):
            wanted = "text"
    elif not isinstance(row["truth"], str):
        key, found, wanted = "truth", row["truth"], "text"
    if wanted:
        raise ValueError(f"prediction {number}: {key}: expected {wanted}, got {found!r}")


def _score(
    name: str, rows: list[Row], vocabulary: Vocabulary | None, tokenizer: str
) -> dict[str, float | str | None]:
    out: dict[str, float | str | None] = {}
    for task in ALL_TASKS:
        mine = [row for row in rows if row["task"] == task]
        if not mine:
            continue
        out[f"n_{task}"] = len(mine)
        texts = [row["answer"] for row in mine]
        references = [row["reference"] for row in mine]
        if task == "ingredients":
            iou = ingredient_iou(
                [parse_answer("ingredients", text) for text in texts], references, vocabulary
            )
            out |= {"ingredient_iou": iou.overall, "ingredient_iou_mean": iou.mean}
            if vocabulary is not None:
                out |= {"ingredient_vocabulary": vocabulary.name, "ingredient_coverage": iou.coverage}
                out["n_ingredients_left_out"] = iou.left_out
        elif task == "recipe":
            truths = [row["truth"] for row in mine]
            chosen = choose_tokenizer(truths, tokenizer)
            out["sacrebleu"], out["sacrebleu_signature"] = sacrebleu(texts, truths, chosen)
            out |= _rouge("rouge_l", name, texts, truths, chosen)
        elif task == "nutrition":
            result = pmae([parse_answer("nutrition", text) for text in texts], references)
            out |= {f"pmae_{name}": value for name, value in result.fields.items()}
            out |= {"pmae": result.mean, "parse_rate": result.parse_rate, "pmae_parsed": result.parsed_mean}
        elif task == "question":
            truths = [row["truth"] for row in mine]
            out["question_exact"] = exact_answers(texts, truths)
            out |= _rouge("question_rouge_l", name, texts, truths, choose_tokenizer(truths, tokenizer))
        else:
            categories = (parse_answer("category", text) for text in texts)
            out["category_accuracy"] = category_accuracy(categories, references)
    return out


def _rouge(
    metric: str, group: str, texts: list[str], truths: list[str], chosen: Tokenizer
) -> dict[str, float | str | None]:
    out: dict[str, float | str | None] = {
        metric: rouge_l(texts, truths, chosen),
        f"{metric}_tokenizer": chosen.rouge,
    }
    answers, references = without_tokens(texts, truths, chosen)
    if answers or references:
        out[f"{metric}_without_tokens"] = answers + references
        logger.warning(
            "%s of %s: the tokenizer %s sees no token in %d of %d answers and in %d of their references, which score 0; "
            "--tokenizer (evaluation.tokenizer) chooses another",
            metric,
            "all sources" if group == "all" else f"source {group!r}",
            chosen.rouge,
            answers,
            len(texts),
            references,
        )
    return out
