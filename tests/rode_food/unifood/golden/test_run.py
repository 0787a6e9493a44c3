from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from golden_engine import Serial
from killed import kill_everywhere
from rode_food.records import read_records
from rode_food.settings import SettingsError, build
from rode_food.unifood.golden.run import run
from rode_food.unifood.golden.settings import GoldenSettings
from rode_food.unifood.settings import UnifoodSettings
from rode_food.usda import UsdaError

MORE = [f"more{i}" for i in range(4)]
OTHERS = [f"others{i}" for i in range(4)]


def kept(stage):
    return [record.id for record in read_records(stage.output)]


def dropped(stage):
    rows = map(json.loads, (stage.folder / "dropped.jsonl").read_text().splitlines())
    return {row["id"]: (row["reason"], row["fields"]) for row in rows}


def test_what_disagrees_is_dropped_and_other_splits_pass(make_stage):
    stage = make_stage()
    report = run(stage)
    assert kept(stage) == ["good", "trained", "broken", *MORE, *OTHERS]
    assert dropped(stage) == {
        "kilojoules": ("outside tolerance", ["energy"]),
        "heavy": ("outside tolerance", ["mass"]),
        "unknown": ("not checkable", []),
        "bare": ("no nutrition label", []),
    }
    assert report == {
        "checked": 14,
        "passed_through": 1,
        "dropped": {"outside tolerance": 2, "not checkable": 1, "no nutrition label": 1},
        "outside": {"energy": 1, "mass": 1},
        "kept": 10,
        "accepted": 0,
        "rejected": 0,
        "undecided": 10,
        "decisions_unused": 0,
    }
    # numbers say why, and nothing else is left behind
    rows = map(json.loads, (stage.folder / "dropped.jsonl").read_text().splitlines())
    numbers = next(row["numbers"] for row in rows if row["id"] == "kilojoules")
    assert numbers["label"]["energy"] == 1757.3
    assert numbers["usda"]["energy"] == 420
    assert sorted(p.name for p in stage.folder.iterdir()) == ["dropped.jsonl", "records.jsonl", "review.html"]


def test_foods_that_the_table_lacks_are_named(make_stage):
    stage = make_stage()
    foods = Path(stage.settings.golden.usda) / "sr28_foods.csv"
    rows = foods.read_text().splitlines()
    foods.write_text("\n".join(row for row in rows if "Flour" not in row) + "\n")
    report = run(stage)
    assert report["lacked_by_the_table"] == {"flour": 12}
    assert report["dropped"]["not checkable"] == 13
    rows = {
        row["id"]: row for row in map(json.loads, (stage.folder / "dropped.jsonl").read_text().splitlines())
    }
    assert rows["good"]["lacking"] == ["flour"]
    assert "lacking" not in rows["unknown"]


def test_records_stay_as_they_were(make_stage):
    stage = make_stage()
    run(stage)
    source = {record.id: record for record in stage.records()}
    assert all(source[record.id] == record for record in read_records(stage.output))


def test_settings_decide(make_stage, tmp_path):
    stage = make_stage(uncheckable="keep", mass_tolerance=None, tolerance=5.0)
    run(stage)
    assert dropped(stage) == {"bare": ("no nutrition label", [])}
    stage = make_stage(splits=["train", "test"])
    run(stage)
    assert dropped(stage)["trained"] == ("outside tolerance", ["energy"])


def test_categories_are_thinned_by_a_hash(make_stage):
    stage = make_stage(max_per_category=2)
    report = run(stage)
    bread = {"good", *MORE}
    first = bread & set(kept(stage))
    assert len(first) == 2
    assert set(OTHERS) <= set(kept(stage))  # "other" is no category
    assert report["dropped"]["category is full"] == 3
    # the same ones again, and a wider cap keeps them
    run(make_stage(max_per_category=3))
    second = bread & set(kept(stage))
    assert len(second) == 3
    assert first < second


@pytest.mark.parametrize(("share", "stay"), [(0.2, 2), (0.35, 3), (0.01, 1), (1.0, 5)])
def test_share_of_a_category(make_stage, share, stay):
    stage = make_stage(max_category_share=share)  # of 10 that agree
    run(stage)
    assert len({"good", *MORE} & set(kept(stage))) == stay


def test_decisions_are_applied_when_called_again(make_stage):
    stage = make_stage()
    run(stage)
    (stage.folder / "decisions.json").write_text('{"good": "reject", "more1": "accept", "gone": "reject"}')
    report = run(stage)
    assert "good" not in kept(stage)
    assert dropped(stage)["good"] == ("rejected by a person", [])
    assert (report["accepted"], report["rejected"], report["undecided"]) == (1, 1, 8)
    assert report["decisions_unused"] == 1
    # a rejected sample can be thought over: it is on the page still
    assert '"id": "good"' in (stage.folder / "review.html").read_text()
    (stage.folder / "decisions.json").write_text("{}")
    run(stage)
    assert "good" in kept(stage)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"decisions.json: not JSON"),
        ("[]", r"decisions.json: expected an object .* got list"),
        ('{"a": "maybe"}', r"decisions.json: a: expected accept or reject, got 'maybe'"),
    ],
)
def test_decisions_that_cannot_be_read_change_nothing(make_stage, text, message):
    stage = make_stage()
    (stage.folder / "decisions.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        run(stage)
    assert (stage.folder / "decisions.json").read_text() == text
    assert not stage.output.exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"usda": None}, r"golden.usda: missing; expected the folder of USDA's tables"),
        ({"splits": ["tests"]}, r"golden.splits: no such split 'tests'; did you mean test"),
        ({"coverage": 1.5}, r"golden.coverage: expected 0 to 1, got 1.5"),
        ({"max_per_category": 0}, r"golden.max_per_category: expected 1 or more, got 0"),
        ({"tolerance": float("nan")}, r"golden.tolerance: expected 0 or more, got nan"),
    ],
)
def test_settings_that_cannot_be(make_stage, settings, message):
    with pytest.raises(SettingsError, match=message):
        run(make_stage(**settings))


def test_missing_tables_are_missed_before_any_work(make_stage, tmp_path):
    stage = make_stage(usda=str(tmp_path / "nowhere"))
    with pytest.raises(UsdaError, match="nowhere is not a folder"):
        run(stage)
    assert list(stage.folder.iterdir()) == []


def test_settings_come_from_yaml():
    values = {"sources": [], "golden": {"usda": "~/x", "mass_tolerance": None, "max_per_category": 5}}
    golden = build(UnifoodSettings, values).golden
    assert golden == GoldenSettings(usda=os.path.expanduser("~/x"), mass_tolerance=None, max_per_category=5)
    with pytest.raises(SettingsError, match=r"golden.tolerence: no such key; did you mean tolerance"):
        build(UnifoodSettings, {"sources": [], "golden": {"tolerence": 1}})


def test_dry_run_changes_nothing(make_stage):
    stage = make_stage(dry_run=True)
    assert run(stage) == {"would_check": 14, "passed_through": 1}
    assert list(stage.folder.iterdir()) == []


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize("fail_at", [0, 1])
def test_an_interrupted_run_goes_on(make_stage, tmp_path, fail_at):
    whole = make_stage()
    run(whole)
    expected = files(whole.folder)
    (tmp_path / "again").mkdir()
    with pytest.raises(KeyboardInterrupt):
        run(make_stage(engine=Serial(fail_at=fail_at), folder=tmp_path / "again"))
    engine = Serial()
    stage = make_stage(engine=engine, folder=tmp_path / "again")
    run(stage)
    assert files(stage.folder) == expected
    assert engine.parts == [14, 10][fail_at:]  # what was checked is not checked again


def test_parts_of_other_settings_are_not_used(make_stage):
    with pytest.raises(KeyboardInterrupt):
        run(make_stage(engine=Serial(fail_at=1)))
    stage = make_stage(tolerance=5.0, key="other")
    run(stage)
    assert "kilojoules" in kept(stage)
    assert not [p for p in stage.folder.iterdir() if p.is_dir()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_killed_at_every_point(make_stage, tmp_path):
    whole = make_stage()
    run(whole)
    again = tmp_path / "again"

    def fresh():
        shutil.rmtree(again, ignore_errors=True)
        again.mkdir()

    def check():
        for left in again.glob(".*.tmp"):  # the builder does so
            left.unlink()
        assert files(again) == files(whole.folder)

    assert kill_everywhere(lambda: run(make_stage(folder=again)), fresh, check) == 2 * 5


@pytest.mark.data
def test_real_tables(make_stage, rode_data):
    stage = make_stage(usda=str(rode_data / "usda"))
    run(stage)
    # flour has 364 kcal, 10.3 g protein and 125 g a cup there: within 30 %
    assert "good" in kept(stage)
    assert dropped(stage)["kilojoules"] == ("outside tolerance", ["energy"])
