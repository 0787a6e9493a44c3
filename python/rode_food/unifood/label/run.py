"""The label stage: from records to records whose every ingredient has mass and nutrition."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode_food.atomic import replacing
from rode_food.records import FoodRecord, Nutrition, write_records
from rode_food.unifood.label.batch import Batches
from rode_food.unifood.label.client import Endpoint
from rode_food.unifood.label.errors import LabelError, Unfinished
from rode_food.unifood.label.ledger import Ledger
from rode_food.unifood.label.live import ask_live
from rode_food.unifood.label.price import Budget, price, price_at_most
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.work import Item, Work, judge
from rode_food.unifood.stage import Stage

if TYPE_CHECKING:
    from rode_food.progress import Progress


def run(stage: Stage) -> dict[str, Any]:
    """Asks what the ledger does not hold yet, then writes `records.jsonl` and `set_aside.jsonl` from the ledger.

    The dish's total is left to the next stage. With `stage.dry_run` nothing is asked or written: see `dry_run`.

    Returns:
        `records`, `labelled`, `labelled_by_source`, `set_aside` (reason -> count), `unanswered` (those of them that the next run
        asks again), `tokens` and `spent` over all that the
        ledger holds.

    Raises:
        SettingsError: a setting that cannot be meant.
        LabelError: the job cannot go on; one line says why. Every answer so far is in the ledger.
        Unfinished: the budget is reached, or batches are under way and `label.wait` is false; `records.jsonl` is not written.
    """
    settings: LabelSettings = stage.settings.label
    settings.check()
    if stage.dry_run:
        return dry_run(stage)
    work = Work(stage)
    with ExitStack() as stack:
        endpoint = Endpoint(settings)
        spare = (1 << 20) + settings.concurrency * (1 << 16)
        ledger = stack.enter_context(Ledger(_ledger_path(stage), spare))
        waiting = ledger.batches()
        if settings.mode == "live" and waiting:
            raise LabelError(
                f"{len(waiting)} batches of an earlier run are under way: finish them with label.mode: batch"
            )
        totals = ledger.totals()
        budget = Budget(settings.budget, totals["cost"] + totals["lost"])
        bar = stack.enter_context(_bar(stage))
        if settings.mode == "live":
            new = work.to_ask(ledger, bar.update)
            within_budget = ask_live(new, ledger, endpoint, budget, settings, bar.update)
            finished, requests = True, 0
        else:
            asked = Batches(work, ledger, endpoint, budget, stage.folder, bar.update)
            within_budget, finished, requests = asked.run()
        if not (finished and within_budget):
            left = _estimate(work, ledger)
            report = left | {"waiting": requests} | _spent(ledger, settings)
            if not finished:
                further = f", {left['to_ask']} contents are still to be submitted" if left["to_ask"] else ""
                raise Unfinished(f"{requests} requests are waiting at the server{further}; run again", report)
            raise Unfinished(
                f"the budget of {settings.budget:g} is reached: {left['to_ask']} contents are left, for about "
                f"{left['cost']:.2f}; raise label.budget and run again",
                report,
            )
        report = _write(stage, work, ledger) | _spent(ledger, settings)
    work.drop_parts()
    return report


def dry_run(stage: Stage) -> dict[str, Any]:
    """Counts and prices the job without calling out.

    Returns:
        `records`, `settled` (records that need no request), `to_ask` (contents), `input_tokens` and `output_tokens` about,
        `cost` about, `cost_at_most` (answers of full length, everything asked twice), and what the ledger holds.
    """
    settings: LabelSettings = stage.settings.label
    settings.check()
    path = _ledger_path(stage)
    with Ledger(path if path.exists() else Path(":memory:")) as ledger:
        return {"dry_run": True} | _estimate(Work(stage), ledger) | _spent(ledger, settings)


def _ledger_path(stage: Stage) -> Path:
    settings: LabelSettings = stage.settings.label
    return Path(settings.ledger) if settings.ledger else stage.folder / "ledger.sqlite"


def _bar(stage: Stage) -> Progress:
    from rode_food.progress import Progress

    total = None
    if stage.progress and stage.source is not None:
        with stage.source.open("rb") as lines:
            total = sum(1 for _ in lines)
    return Progress(total=total, desc=stage.name, unit="record", show=stage.progress)


def _spent(ledger: Ledger, settings: LabelSettings) -> dict[str, Any]:
    totals = ledger.totals()
    report = {
        "answers": totals["answers"],
        "tokens": {
            "input": totals["input_tokens"],
            "output": totals["output_tokens"],
            "answers_with_estimated_tokens": totals["estimated"],
        },
        "spent": round(totals["cost"], 6),
        "lost_at_most": round(totals["lost"], 6),
    }
    if settings.budget is not None:
        left = settings.budget - totals["cost"] - totals["lost"] - totals["reserved"]
        report |= {"budget": settings.budget, "budget_left": round(left, 6)}
    return report


def _estimate(work: Work, ledger: Ledger) -> dict[str, Any]:
    settings = work.settings
    records = to_ask = settled = prompt = answer = 0
    at_most = 0.0

    def count() -> None:
        nonlocal settled
        settled += 1

    for item, verdict in work.to_ask(ledger, count):
        tokens = item.estimate(verdict, settings)
        to_ask += 1
        prompt += tokens.prompt
        answer += tokens.answer
        at_most += price_at_most(tokens, settings) * (1 if verdict.failed else 2)
    records = to_ask + settled
    return {
        "records": records,
        "settled": settled,
        "to_ask": to_ask,
        "input_tokens": prompt,
        "output_tokens": answer,
        "cost": round(price(prompt, answer, settings), 6),
        "cost_at_most": round(at_most, 6),
    }


def _write(stage: Stage, work: Work, ledger: Ledger) -> dict[str, Any]:
    settings = work.settings
    reasons: Counter[str] = Counter()
    by_source = total = unanswered = 0
    last: dict[str, str] = {}

    with replacing(stage.folder / "set_aside.jsonl") as aside:

        def labelled() -> Iterator[FoodRecord]:
            nonlocal by_source, total, unanswered, last
            for record, item in work.rows():
                total += 1
                if item is None:
                    by_source += 1
                    yield record
                    continue
                if isinstance(item, Item):
                    verdict = judge(ledger.get(item.key), item.ingredients, settings)
                    if verdict.state == "answered":
                        yield _labelled(record, verdict.nutrition)
                        continue
                    reason, detail = verdict.reason, verdict.detail
                    unanswered += verdict.state == "ask"
                else:
                    reason, detail = item
                reasons[reason] += 1
                entry = {"id": record.id, "reason": reason, "detail": detail}
                aside.write(json.dumps(entry, ensure_ascii=False) + "\n")
                last = entry
            if last and sum(reasons.values()) == total:
                raise LabelError(f"none of {total} records could be labelled; the last: {json.dumps(last)}")

        written = write_records(stage.output, labelled())
    return {
        "records": total,
        "labelled": written,
        "labelled_by_source": by_source,
        "set_aside": dict(sorted(reasons.items())),
        "unanswered": unanswered,
    }


def _labelled(record: FoodRecord, nutrition: tuple[Nutrition, ...]) -> FoodRecord:
    ingredients = tuple(
        replace(ingredient, mass=answer.mass, nutrition=answer)
        for ingredient, answer in zip(record.ingredients, nutrition, strict=True)
    )
    return replace(record, ingredients=ingredients)
