"""The stage that describes what was built, and finds the vocabulary of its ingredients; records pass through as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rode_food.html import require_matplotlib
from rode_food.records import FoodRecord, write_records
from rode_food.statistics import Collector
from rode_food.statistics_page import write_statistics
from rode_food.unifood.stage import Stage
from rode_food.vocabulary import Vocabulary, VocabularyError


def run(stage: Stage) -> dict[str, Any]:
    """Writes statistics.json, table1.md, PNG files and statistics.html beside the records, and vocabulary.json where the
    training split names an ingredient often enough.

    Records are written anew and not copied, for one may name its picture relative to the folder that it was in.

    Returns:
        "records", "categories" (distinct), "vocabulary" (canonical names, 0 for none), and "page": the name of its HTML page.
        In a dry run only what would be written.

    Raises:
        ImportError: without matplotlib, before anything is read.
        RecordError: see `read_records`. OSError: see `rode_food.atomic.replacing`.
    """
    require_matplotlib()
    if stage.dry_run:
        return {"would write": str(stage.folder / "statistics.html")}
    collector = Collector()

    def passing() -> Iterator[FoodRecord]:
        for record in stage.records():
            collector.add(record)
            yield record

    write_records(stage.output, passing())
    statistics = collector.result()
    files = write_statistics(stage.folder, statistics, name=stage.settings.name)
    vocabulary = _vocabulary(stage)
    return {
        "records": statistics["records"],
        "categories": statistics["categories"]["distinct"],
        "vocabulary": vocabulary,
        "page": files[-1].name,
    }


def _vocabulary(stage: Stage) -> int:
    path = stage.folder / "vocabulary.json"
    try:
        vocabulary = Vocabulary.build(stage.records(), min_count=stage.settings.vocabulary.min_count)
    except VocabularyError:  # a small set names nothing so often
        path.unlink(missing_ok=True)
        return 0
    vocabulary.save(path)
    return len(vocabulary)
