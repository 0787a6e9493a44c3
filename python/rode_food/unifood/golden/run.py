"""The golden stage: checks the labels of the test split, thins its categories, and asks a person about the rest."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from rode_food.atomic import replacing
from rode_food.records import SPLITS, FoodRecord, record_to_json, write_records
from rode_food.settings import SettingsError, did_you_mean
from rode_food.tasks import stable_hash
from rode_food.unifood.golden.check import OUTSIDE, check_lines, page_lines
from rode_food.unifood.golden.decisions import read_decisions
from rode_food.unifood.golden.page import write_page
from rode_food.unifood.golden.settings import GoldenSettings
from rode_food.unifood.stage import Stage
from rode_food.usda.estimate import shared_estimator

THINNED = "category is full"
REJECTED = "rejected by a person"
DROPPED = "dropped.jsonl"
PAGE = "review.html"
_NAMED = 10  # foods named in the report


def run(stage: Stage) -> dict[str, Any]:
    """Writes records.jsonl, dropped.jsonl (id, category, reason, fields, lacking, numbers) and review.html.

    Records of other splits than `golden.splits` pass through. Of the rest stay those whose label agrees with USDA's
    tables, at most so many of a category, without those that `decisions.json` in the stage's folder rejects; whoever is
    not decided on stays and is counted. Called again it does the same with the decisions that there are then.

    Returns:
        Counts: `checked`, `passed_through`, `dropped` by reason, `outside` by field, `kept`, `accepted`, `rejected`,
        `undecided`, `decisions_unused` (for samples that are not among those asked about), and if the table lacks foods that names
        mean, `lacked_by_the_table`: food -> samples.

    Raises:
        SettingsError: without `golden.usda`, or for a split that is none.
        UsdaError, ImportError, OSError: tables or parser that are missing; says what to do.
        ValueError: for decisions that cannot be read.
    """
    settings = _checked(stage.settings.golden)
    if stage.dry_run:
        chosen = Counter(record.split in settings.splits for record in stage.records())
        return {"would_check": chosen[True], "passed_through": chosen[False]}
    shared_estimator(settings.usda or "", settings.state)  # what is missing is missed here, not in a worker
    decisions = read_decisions(stage.folder)

    def lines(ids: set[str] | None = None) -> Iterator[str]:
        for record in stage.records():
            if record.split in settings.splits and (ids is None or record.id in ids):
                yield json.dumps(record_to_json(record), ensure_ascii=False)

    checked = functools.partial(stage.in_parts, "checked", functools.partial(check_lines, settings=settings))
    reasons: dict[str, str] = {}
    outside: Counter[str] = Counter()
    lacking: Counter[str] = Counter()
    agreeing: list[tuple[str, str | None]] = []
    for row in map(json.loads, checked(lines())):
        lacking.update(dict.fromkeys(row.get("lacking", ()), 1))
        if row["reason"] is None:
            agreeing.append((row["id"], row["category"]))
        else:
            reasons[row["id"]] = row["reason"]
            outside.update(row["fields"] if row["reason"] == OUTSIDE else ())
    total = len(agreeing) + len(reasons)
    reasons |= dict.fromkeys(_too_many(agreeing, settings), THINNED)
    asked = {id for id, _ in agreeing if id not in reasons}
    reasons |= {id: REJECTED for id in asked if decisions.get(id) == "reject"}

    with replacing(stage.folder / DROPPED) as out:
        for row in map(json.loads, checked(lines())):
            if row["id"] in reasons:
                out.write(json.dumps(row | {"reason": reasons[row["id"]]}, ensure_ascii=False) + "\n")
    # a part is little, for an entry holds its picture
    entries = stage.in_parts("page", functools.partial(page_lines, settings=settings), lines(asked), part=50)
    write_page(stage.folder / PAGE, entries, decisions)
    passed = 0

    def kept() -> Iterator[FoodRecord]:
        nonlocal passed
        for record in stage.records():
            passed += record.split not in settings.splits
            if record.split not in settings.splits or record.id not in reasons:
                yield record

    write_records(stage.output, kept())
    stage.drop_parts("checked")
    stage.drop_parts("page")
    return {
        "checked": total,
        "passed_through": passed,
        "dropped": dict(Counter(reasons.values()).most_common()),
        "outside": dict(outside.most_common()),
        "kept": total - len(reasons),
        "accepted": sum(decisions.get(id) == "accept" for id in asked),
        "rejected": sum(decisions.get(id) == "reject" for id in asked),
        "undecided": sum(id not in decisions for id in asked),
        "decisions_unused": sum(id not in asked for id in decisions),
        **({"lacked_by_the_table": dict(lacking.most_common(_NAMED))} if lacking else {}),
    }


def _checked(settings: GoldenSettings) -> GoldenSettings:
    """The settings, their folder absolute (a worker may stand elsewhere), or an error that names the key."""
    if not settings.usda:
        raise SettingsError("golden.usda: missing; expected the folder of USDA's tables (docs/golden.md)")
    for split in settings.splits:
        if split not in SPLITS:
            raise SettingsError(f"golden.splits: no such split {split!r}; {did_you_mean(split, SPLITS)}")
    for key, low, high in (
        ("tolerance", 0, math.inf),
        ("energy_floor", 0, math.inf),
        ("macro_floor", 0, math.inf),
        ("coverage", 0, 1),
        ("mass_tolerance", 0, math.inf),
        ("max_per_category", 1, math.inf),
        ("max_category_share", 0, 1),
    ):
        value = getattr(settings, key)
        if value is not None and not low <= value <= high:
            limits = f"{low} to {high}" if high < math.inf else f"{low} or more"
            raise SettingsError(f"golden.{key}: expected {limits}, got {value!r}")
    return dataclasses.replace(settings, usda=os.path.abspath(settings.usda))


def _too_many(agreeing: list[tuple[str, str | None]], settings: GoldenSettings) -> list[str]:
    """Ids beyond the cap of their category; a hash of the id says which stay, so that order and other samples do not."""
    caps = [] if settings.max_per_category is None else [settings.max_per_category]
    if settings.max_category_share is not None:
        caps.append(max(1, math.floor(settings.max_category_share * len(agreeing))))
    if not caps:
        return []
    members: defaultdict[str, list[str]] = defaultdict(list)
    for id, category in agreeing:
        if category is not None and category != "other":
            members[category].append(id)
    return [
        id
        for ids in members.values()
        for id in sorted(ids, key=lambda id: (stable_hash("golden", id), id))[min(caps) :]
    ]
