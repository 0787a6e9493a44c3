"""The statistics stage: records pass through, and what is stopped half-way leaves nothing wrong behind."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib")
from killed import kill_everywhere
from rode_food import FoodRecord, Ingredient, RecordError, read_records, write_records
from rode_food.statistics import collect
from rode_food.unifood.stage import Stage
from rode_food.unifood.statistics import run
from rode_food.vocabulary import Vocabulary


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """A function from `dry_run` to the stage; the records of the stage before lie in "before", with a picture beside them."""
    before, folder = tmp_path / "before", tmp_path / "statistics"
    before.mkdir()
    folder.mkdir()
    records = [
        FoodRecord(
            id=f"d{i}",
            image="near.jpg" if i % 2 else "/far.jpg",
            source="s",
            category="soup" if i else "pie",
            ingredients=(Ingredient("egg"),),
            split="train",
        )
        for i in range(4)
    ]
    write_records(before / "records.jsonl", records)

    def make(dry_run: bool = False, min_count: int = 10) -> Stage:
        settings = SimpleNamespace(name="tiny", vocabulary=SimpleNamespace(min_count=min_count))
        return Stage("statistics", folder, before / "records.jsonl", settings, None, dry_run=dry_run)  # type: ignore[arg-type]

    return make


def test_records_pass_through(make: Any) -> None:
    stage = make()
    report = run(stage)
    page = stage.folder / "statistics.html"
    assert report == {"records": 4, "categories": 2, "vocabulary": 0, "page": page.name}
    assert list(read_records(stage.output)) == list(read_records(stage.source))  # pictures included
    found = json.loads((stage.folder / "statistics.json").read_text())
    assert found == {"name": "tiny", **collect(read_records(stage.source))}
    assert "| tiny | 4 | 100 % (2 classes) |" in (stage.folder / "table1.md").read_text()
    before = {path: path.read_bytes() for path in stage.folder.iterdir()}
    assert run(stage) == report
    assert {path: path.read_bytes() for path in stage.folder.iterdir()} == before


def test_the_vocabulary_of_the_training_split(make: Any) -> None:
    stage = make(min_count=2)
    records = [
        FoodRecord(
            id=f"v{i}", image="/a.jpg", source="s", split="train" if i < 3 else "test",
            ingredients=(Ingredient("eggs" if i else "egg"), Ingredient("rice")), instructions=("Boil the rice.", "Fry it."),
        )
        for i in range(5)
    ]  # fmt: skip
    write_records(stage.source, records)
    assert run(stage)["vocabulary"] == 2
    vocabulary = Vocabulary.load(stage.folder / "vocabulary.json")
    assert vocabulary.counts == {"egg": 3, "rice": 3}
    assert run(make(min_count=4))["vocabulary"] == 0
    assert not (stage.folder / "vocabulary.json").exists()


def test_a_run_that_stops_leaves_no_half(make: Any) -> None:
    stage = make()
    whole = stage.source.read_text()
    stage.source.write_text(whole + '{"id": "d9"}\n')
    with pytest.raises(RecordError, match=r"records.jsonl:5: source: missing"):
        run(stage)
    assert list(stage.folder.iterdir()) == []
    stage.source.write_text(whole)
    assert run(stage)["records"] == 4


def test_a_dry_run_changes_nothing(make: Any) -> None:
    stage = make(dry_run=True)
    assert run(stage) == {"would write": str(stage.folder / "statistics.html")}
    assert list(stage.folder.iterdir()) == []


def test_matplotlib_is_asked_for_first(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stage = make()
    with pytest.raises(ImportError, match="pip install 'rode"):
        run(stage)
    assert list(stage.folder.iterdir()) == []


@pytest.mark.slow
def test_killed_at_every_point(make: Any, tmp_path: Path) -> None:
    stage = make(min_count=2)

    def snapshot() -> dict[str, bytes]:
        return {
            path.name: path.read_bytes() for path in stage.folder.iterdir() if not path.name.endswith(".tmp")
        }

    def fresh() -> None:
        for path in stage.folder.iterdir():
            path.unlink()

    run(stage)
    whole = snapshot()

    def check() -> None:
        assert snapshot() == whole

    assert kill_everywhere(lambda: run(stage), fresh, check) >= 2 * len(whole)
