"""Questions and answers made from records: ingredients, recipe, nutrition, category, and the record's own questions.

Answers are short and regular, for each answer token costs a decoding step; `parse_answer` undoes them and
also takes what a model makes of them (extra words, other units, another order).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, overload

from rode_food.nutrition_text import format_nutrition, parse_nutrition
from rode_food.records import NUTRITION_FIELDS, FoodRecord, Turn

TASKS = ("ingredients", "recipe", "nutrition", "category")
"""The tasks that ask about pictures of food, in wordings of ours."""
FREE_QUESTION = "question"
"""The task whose questions and answers stand in the record itself (`FoodRecord.conversation`)."""
ALL_TASKS = (*TASKS, FREE_QUESTION)
WORDINGS = ("first", "all", "random")

QUESTIONS: dict[str, tuple[str, ...]] = {
    "ingredients": (
        "What ingredients are in this dish?",
        "List the ingredients of this food.",
        "Which ingredients can you recognise in the picture?",
        "Name everything that this dish is made of.",
        "What was used to make this food?",
    ),
    "recipe": (
        "How is this dish made?",
        "Write the cooking instructions for this dish.",
        "Give a recipe for the food in the picture.",
        "What are the steps to prepare this food?",
        "Explain how to cook this dish.",
    ),
    "nutrition": (
        "What is the nutrition of this dish?",
        "Estimate the mass, energy, fat, protein and carbohydrate of this food.",
        "How much energy and which nutrients does this dish contain?",
        "Give the nutrition facts of the food in the picture.",
        "State the weight, calories and macronutrients of this dish.",
    ),
    "category": (
        "What kind of dish is this?",
        "Which category does this food belong to?",
        "Classify the food in the picture.",
        "Name the category of this dish.",
        "What type of food is shown?",
    ),
}
"""Wordings of each task's question; the first one is used for evaluation."""


Reference = list[str] | dict[str, float] | str
"""The truth of an answer: ingredients or steps; the five numbers of a dish; a category or a free answer."""
Answer = list[str] | dict[str, float | None] | str
"""What an answer says, of the same kinds; a number that it does not give is None."""


@dataclass(frozen=True)
class Example:
    """One question about one picture, several, or none.

    Attributes:
        record_id: the record's id.
        image: absolute path of the first picture, or "".
        task: one of `ALL_TASKS`.
        question: without prompt template or image token.
        answer: the target text.
        reference: the truth that metrics compare with, JSON-able: ingredients and recipe: list of str;
            nutrition: the five of `NUTRITION_FIELDS`, not rounded; category and question: str.
        source: by which metrics are kept apart.
        split: "train", "val", "test" or None.
        more_images: the paths of the pictures after the first.
    """

    record_id: str
    image: str
    task: str
    question: str
    answer: str
    reference: Reference
    source: str
    split: str | None
    more_images: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[str, ...]:
        """The paths of all pictures, in their order."""
        return (self.image, *self.more_images) if self.image else ()


def stable_hash(*parts: object) -> int:
    """64 bits of SHA-256: the same in every process and on every machine, unlike Python's `hash`."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _check_task(task: str, known: tuple[str, ...] = ALL_TASKS) -> None:
    if task not in known:
        raise ValueError(f"task: expected one of {', '.join(known)}, got {task!r}")


def question(task: str, index: int = 0) -> str:
    """The task's question in wording `index` (counted modulo the number of wordings)."""
    _check_task(task, TASKS)
    return QUESTIONS[task][index % len(QUESTIONS[task])]


def make_examples(
    record: FoodRecord, tasks: Iterable[str] = ALL_TASKS, *, wording: str = "first", seed: int = 0
) -> list[Example]:
    """The questions that a record can answer; a task whose truth it lacks yields none.

    A record without a picture answers its own questions alone: the wordings of ours ask about what can be seen.

    Args:
        record: as `read_records` gives it; its images must be absolute paths.
        tasks: which tasks, in which order.
        wording: "first" (evaluation), "all" (one example per wording) or "random": one, chosen by a hash of
            (seed, record id, task), so that it depends neither on order nor on process. The record's own questions have one.
        seed: for "random".

    Raises:
        ValueError: for an unknown task or wording, or a relative image path.
    """
    if wording not in WORDINGS:
        raise ValueError(f"wording: expected one of {', '.join(WORDINGS)}, got {wording!r}")
    for image in record.images:
        if not os.path.isabs(image):
            raise ValueError(
                f"record {record.id!r}: image {image!r} is relative; read_records makes it absolute"
            )
    return [
        Example(
            record.id,
            record.image,
            task,
            text,
            answer,
            reference,
            record.source,
            record.split,
            record.more_images,
        )
        for task in tasks
        for text, answer, reference in _asked(task, record, wording, seed)
    ]


def _asked(task: str, record: FoodRecord, wording: str, seed: int) -> Iterator[tuple[str, str, Reference]]:
    """(question, answer, reference) of each example of a task."""
    _check_task(task)
    if task == FREE_QUESTION:
        for number, turn in enumerate(record.conversation):
            yield in_context(record.conversation[:number], turn.question), turn.answer, turn.answer
        return
    truth = _truth(task, record) if record.image else None
    if truth is None:
        return
    wordings = QUESTIONS[task]
    index = stable_hash(seed, record.id, task) % len(wordings) if wording == "random" else 0
    for text in wordings if wording == "all" else (wordings[index],):
        yield text, *truth


def in_context(earlier: Iterable[Turn], question: str) -> str:
    """A question as it is asked after earlier turns: their texts stand before it, so that "And how much of it?" has a sense."""
    return "".join(f"{turn.question}\n{turn.answer}\n\n" for turn in earlier) + question


def _truth(task: str, record: FoodRecord) -> tuple[str, Reference] | None:
    """(answer, reference) of one of `TASKS`, or None where the record lacks it."""
    if task == "ingredients":
        names = ingredient_names(record)
        return (", ".join(names), names) if names else None
    if task == "recipe":
        # through the parser, so that the reference is what a perfect answer parses to
        steps = _parse_recipe("\n".join(" ".join(step.split()) for step in record.instructions))
        return ("\n".join(steps), steps) if steps else None
    if task == "nutrition":
        if record.nutrition is None or not record.nutrition.complete:
            return None
        values = {name: getattr(record.nutrition, name) for name in NUTRITION_FIELDS}
        return format_nutrition(values), values
    category = None if record.category is None else _parse_category(record.category)
    return None if category is None else (category, category)


_BETWEEN_NAMES = re.compile(r"[,;\n|、，；｜،؛]")
"""Commas, semicolons, lines: those of Latin, Chinese, Japanese and Arabic text."""


def answer_name(name: str) -> str:
    """An ingredient's name as the answer writes it: no commas or semicolons, no bullet; empty where nothing is left."""
    # through the parser's own cleaning, so that answer -> parse gives the same names
    return _clean_item(_BETWEEN_NAMES.sub(" ", name))


def ingredient_names(record: FoodRecord) -> list[str]:
    """Names in the record's order as the answer writes them, each name once."""
    names: dict[str, str] = {}
    for ingredient in record.ingredients:
        if name := answer_name(ingredient.name):
            names.setdefault(name.casefold(), name)
    return list(names.values())


@overload
def parse_answer(task: Literal["ingredients", "recipe"], text: str) -> list[str] | None: ...
@overload
def parse_answer(task: Literal["nutrition"], text: str) -> dict[str, float | None] | None: ...
@overload
def parse_answer(task: Literal["category", "question"], text: str) -> str | None: ...
@overload
def parse_answer(task: str, text: str) -> Answer | None: ...
def parse_answer(task: str, text: str) -> Answer | None:
    """Reads a model's answer; None if nothing of use is in it.

    Returns:
        ingredients: list of names (each once). recipe: list of steps. nutrition: dict of the five fields in
        g and kcal, None for a field that was not found. category: str, lower case. question: the text, without the white
        space around it.
    """
    _check_task(task)
    if task == FREE_QUESTION:
        return text.strip() or None
    if task == "nutrition":
        return parse_nutrition(text)
    if task == "category":
        return _parse_category(text)
    return (_parse_ingredients(text) if task == "ingredients" else _parse_recipe(text)) or None


_LEAD_IN = re.compile(
    r"^\W*(?:(?:sure|certainly|of course)\W+)?"
    r"(?:[^,:;\n]{0,60}?\bingredients?\b[^,:;\n]{0,40}?(?:\b(?:are|is|include|includes)\b\s*:?|:)"
    r"|(?:this|the|it)\b[^,:;\n]{0,40}?\b(?:contains|includes|is made (?:of|from|with)|consists of)\b\s*:?)",
    re.IGNORECASE,
)
_BULLET = re.compile(r"^\s*(?:[-*•·]+\s+|\(?\d{1,3}[.)]\s+|step\s+\d{1,3}\s*[:.)-]\s*)", re.IGNORECASE)


_CONJUNCTION = re.compile(r"^(?:and|or)\s+", re.IGNORECASE)
_WORD = re.compile(r"\w")


def _clean_item(text: str) -> str:
    text = _CONJUNCTION.sub("", _BULLET.sub("", " ".join(text.split())))
    text = text.strip(" .:*\"'")
    return text if _WORD.search(text) else ""


def _parse_ingredients(text: str) -> list[str]:
    """Splits on commas, semicolons and lines. A bare "and" splits the last item only where a lead-in shows
    that the answer is a sentence: "salt and pepper" in a plain list is one name."""
    lead_in = _LEAD_IN.match(text)
    rest = text[lead_in.end() :] if lead_in else text
    items = [item for item in _BETWEEN_NAMES.split(rest) if item.strip()]
    if items and lead_in and not lead_in[0].endswith(":") and "\n" not in rest.strip():
        items[-1:] = re.split(r"\s+and\s+", items[-1].split(". ")[0])
    names: dict[str, str] = {}
    for name in filter(None, map(_clean_item, items)):
        names.setdefault(name.casefold(), name)
    return list(names.values())


_STEP_END = re.compile(r"\n|(?<=[.!?])\s+(?=\d{1,2}[.)]\s)")
"""Where a step of a recipe ends: some models number the steps within one line."""


def _parse_recipe(text: str) -> list[str]:
    steps = (" ".join(_BULLET.sub("", line).split()) for line in _STEP_END.split(text))
    return [step for step in steps if _WORD.search(step)]


def _parse_category(text: str) -> str | None:
    text = " ".join(text.replace("_", " ").split()).strip(" .!:*\"'").lower()
    text = re.sub(
        r"^(?:(?:the|this|it|its)\b[^,.:]{0,40}?\b(?:is|belongs to|shows)\b\s*:?|category\s*:)\s*", "", text
    )
    text = re.sub(r"^(?:an?|the)\s+", "", text).strip(" .!:*\"'")
    return text or None
