"""The work of the label stage: what there is to ask, by content, and what is to be done about each content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from rode_food.images import open_picture, picture_size
from rode_food.records import FoodRecord, Ingredient, Nutrition
from rode_food.unifood.label.ledger import Content, Ledger
from rode_food.unifood.label.price import Estimate, estimate, price_at_most
from rode_food.unifood.label.prompt import PROMPT_VERSION, ingredient_line
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.validate import check_answer
from rode_food.unifood.stage import Stage


@dataclass(frozen=True)
class Item:
    """One content: a picture and a list of ingredients.

    Attributes:
        key: the hash under which the ledger knows it.
        record_id: of the first record that has it.
        image: path.
        size: width and height of the file's picture in pixels.
        ingredients: in order, numbered from 1 in the question.
    """

    key: str
    record_id: str
    image: str
    size: tuple[int, int]
    ingredients: tuple[Ingredient, ...]

    @property
    def lines(self) -> list[str]:
        return [ingredient_line(ingredient) for ingredient in self.ingredients]

    def estimate(self, verdict: Verdict, settings: LabelSettings) -> Estimate:
        return estimate(self.lines, self.size, settings, verdict.failed)

    def mark(self, verdict: Verdict, settings: LabelSettings) -> tuple[str, str, str, str, float]:
        """The ledger learns of a request before it is sent."""
        at_most = price_at_most(self.estimate(verdict, settings), settings)
        return self.key, self.record_id, settings.model, PROMPT_VERSION, at_most


@dataclass(frozen=True)
class Verdict:
    """The next step for a content.

    Attributes:
        state: "ask" it (again), or it is settled.
        nutrition: of each ingredient, if answered.
        reason: why it was set aside, or what the last try met with.
        detail: more of that, at most a line.
        failed: for asking again: the answer that could not be used, and what is wrong with it.
    """

    state: Literal["ask", "answered", "set aside"]
    nutrition: tuple[Nutrition, ...] = ()
    reason: str = ""
    detail: str = ""
    failed: tuple[str, tuple[str, ...]] | None = None


def judge(content: Content | None, ingredients: tuple[Ingredient, ...], settings: LabelSettings) -> Verdict:
    """Decides from the answers themselves, not from what was thought of them before: with other tolerances another
    verdict may come out, and no answer has to be paid for again.

    An answer that was cut off at a smaller `max_tokens` than today's does not count.
    """
    if content is None:
        return Verdict("ask")
    if content.status == "refused":
        return Verdict("set aside", reason=content.reason or "", detail=content.detail or "")
    first = ""
    verdict = Verdict("ask")
    for reply in content.replies:
        if reply.finish_reason == "length" and reply.max_tokens < settings.max_tokens:
            continue
        text = reply.text
        told: tuple[str, ...]
        if reply.refusal or reply.finish_reason == "content_filter":
            reason, text = "refusal", reply.refusal or text
            told = ("it is a refusal; an estimate is wanted",)
            detail = text or "content filter"
        elif reply.finish_reason == "length":
            reason, detail = "truncated", f"cut off at {reply.max_tokens} tokens"
            told = ("it was cut off before its end; be brief",)
        else:
            nutrition, problems = check_answer(text, ingredients, settings)
            if not problems:
                return Verdict("answered", tuple(nutrition))
            reason, detail = problems[0].reason, problems[0].detail
            told = tuple(problem.detail for problem in problems)
        detail = " ".join(detail.split())[:300]
        if first:
            return Verdict("set aside", reason=reason, detail=f"{detail} (at first: {first})")
        first = reason
        verdict = Verdict("ask", reason=reason, detail=detail, failed=(text, told))
    if content.status == "no answer":  # what it met with last
        verdict = replace(verdict, reason=content.reason or "", detail=content.detail or "")
    return verdict


def is_labelled(record: FoodRecord) -> bool:
    """Its source says what is in every ingredient: measured, as in Nutrition5k, and better than any answer."""
    return bool(record.ingredients) and all(
        ingredient.mass is not None and ingredient.nutrition is not None and ingredient.nutrition.complete
        for ingredient in record.ingredients
    )


def fingerprint(basis: str, lines: list[str]) -> list[str]:
    """From [path, ingredient lines] to [key, width, height], or ["", what is wrong with the picture]; all as JSON."""
    rows = []
    for line in lines:
        path, texts = json.loads(line)
        try:
            with open_picture(path) as file:
                data = file.read()
            size = picture_size(path)
        except Exception as error:  # Pillow raises any type for a header that is damaged
            rows.append(json.dumps(["", " ".join(str(error).split())]))
            continue
        content = json.dumps([basis, hashlib.sha256(data).hexdigest(), texts], ensure_ascii=False)
        key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        rows.append(json.dumps([key, *size]))
    return rows


class Work:
    """The stage's records beside their contents' keys. A key covers what decides an answer's sense: prompt version, model,
    structured mode, whether micronutrients are asked for, how the picture is shown, its bytes, and the ingredients' lines.
    """

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.settings: LabelSettings = stage.settings.label
        s = self.settings
        basis = [PROMPT_VERSION, s.model, s.structured, s.micronutrients, s.image_side, s.image_detail]
        self._basis = json.dumps(basis)
        if stage.source is None:
            raise ValueError(f"stage {stage.name}: no stage before it")
        digest = hashlib.sha256(self._basis.encode())
        with stage.source.open("rb") as source:
            while block := source.read(1 << 20):
                digest.update(block)
        self._parts = f"keys-{digest.hexdigest()[:16]}"  # of these records and settings, no others

    def rows(self) -> Iterator[tuple[FoodRecord, Item | tuple[str, str] | None]]:
        """Each record with its content; None where nothing is to be asked, reason and detail where nothing can be."""

        def questions() -> Iterator[str]:
            for record in self.stage.records():
                texts = [] if is_labelled(record) else [ingredient_line(i) for i in record.ingredients]
                yield json.dumps([record.image, texts], ensure_ascii=False)

        keys = self.stage.in_parts(self._parts, partial(fingerprint, self._basis), questions())
        for record, row in zip(self.stage.records(), keys, strict=True):
            key, *rest = json.loads(row)
            if is_labelled(record):
                yield record, None
            elif not record.ingredients:
                yield record, ("no ingredients", "there is nothing to ask about")
            elif not key:
                yield record, ("picture", rest[0])
            else:
                yield record, Item(key, record.id, record.image, (rest[0], rest[1]), record.ingredients)

    def to_ask(
        self, ledger: Ledger, settled: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[Item, Verdict]]:
        """Contents that need a request now, each once, in the records' order; `settled()` is called for every other record."""
        seen: set[bytes] = set()
        for _, item in self.rows():
            if isinstance(item, Item) and (short := bytes.fromhex(item.key)) not in seen:
                seen.add(short)
                content = ledger.get(item.key)
                verdict = judge(content, item.ingredients, self.settings)
                if verdict.state == "ask" and (
                    content is None or content.status not in ("in flight", "no answer")
                ):
                    yield item, verdict
                    continue
            settled()

    def drop_parts(self) -> None:
        self.stage.drop_parts("keys-*")  # of other bases as well
