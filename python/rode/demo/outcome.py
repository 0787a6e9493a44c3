"""The demo's findings, phase by phase, and what it compares with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rode_food import Example, load_examples
from rode_food.source import Source


@dataclass
class Outcome:
    """The demo's findings, for the table and the report.

    Attributes:
        scores: column -> metric -> value (`rode_food.metrics.score`'s "all").
        mean_pmae: field or "pmae" -> percent, of always answering the training split's mean; {} without nutrition.
        predictions: column -> rows of predictions.jsonl.
        histories: run -> Trainer's log.
        gates: kind of token -> (blocks, rows of mean gates, by expert), of RoDE on the held-out records.
        seconds: phase -> wall time.
        facts: lines for the report.
    """

    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    mean_pmae: dict[str, float | None] = field(default_factory=dict)
    predictions: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    histories: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    gates: dict[str, tuple[list[int], list[list[float | None]]]] = field(default_factory=dict)
    ranks: tuple[int, ...] = (2, 4, 8, 16)
    seconds: dict[str, float] = field(default_factory=dict)
    facts: list[str] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Say what begins, and how long it took."""
        print(f"== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        print(f"   {self.seconds[name]:.0f} s", flush=True)


def examples_of(data: Path, split: str, most: int | None = None) -> list[Example]:
    """All questions, in their first wording, of a split's first `most` records."""
    found = load_examples([Source(str(data))], split).examples
    ids = list(dict.fromkeys(example.record_id for example in found))[:most]
    kept = set(ids)
    return [example for example in found if example.record_id in kept]


def always_the_mean(train: Sequence[Example], test: Sequence[Example]) -> dict[str, float | None]:
    """pMAE of answering every nutrition question with the training split's mean; {} if there is none."""
    from rode_food.metrics.nutrition import mean_baseline

    known, wanted = (
        [e.reference for e in side if e.task == "nutrition" and isinstance(e.reference, dict)]
        for side in (train, test)
    )
    if not (known and wanted):
        return {}
    result = mean_baseline(known, wanted)
    return {**{f"pmae_{name}": value for name, value in result.fields.items()}, "pmae": result.mean}
