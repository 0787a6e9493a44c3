from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import data
from benchmarks.made_up_recipe1m import recipe, recipe_id, write_recipe1m


def test_what_is_read_wrong_is_not_timed(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_recipe1m(folder, 30)
    assert data.check_reading(folder, 30) == {}
    row = data.time_reading(folder, 30)
    assert row["records"] == 30
    assert row["peak_mib"] >= row["imports_mib"] > 10
    with pytest.raises(RuntimeError, match="reading 31 recipes is wrong: nothing is timed"):
        data.check_reading(folder, 31)
    layer1 = (folder / "layer1.json").read_text()
    (folder / "layer1.json").write_text(layer1.replace(recipe(7)["title"], "Another"))
    with pytest.raises(RuntimeError, match="reading 30 recipes is wrong"):
        data.check_reading(folder, 30)


def test_what_is_chosen_wrong_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "r"
    write_recipe1m(folder, 60)
    assert data.check_choosing(folder, 60) == {}
    assert data.time_choosing(folder, 60)["records"] == 60
    order = data.select._order
    monkeypatch.setattr(data.select, "_order", lambda candidates: order(candidates)[1:])
    with pytest.raises(RuntimeError, match="choosing from 60 recipes is wrong: nothing is timed"):
        data.check_choosing(folder, 60)


def test_recipes_follow_from_seed_and_number() -> None:
    assert recipe(5, 1) == recipe(5, 1)
    assert recipe(5, 1) != recipe(5, 2)
    assert recipe(5, 1) != recipe(6, 1)
    assert len({recipe_id(n) for n in range(1000)}) == 1000


@pytest.mark.slow
def test_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data.main(Namespace(recipes=[40, 20], folder=str(tmp_path), json=str(tmp_path / "rows.json")))
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [(row["measure"], row["recipes"], row["records"]) for row in rows] == [
        ("read", 40, 40),
        ("choose", 40, 40),
        ("read", 20, 20),
        ("choose", 20, 20),
    ]
    assert capsys.readouterr().out.count("\n") == 5
    assert list(tmp_path.iterdir()) == [tmp_path / "rows.json"]
    with pytest.raises(RuntimeError, match=r"read of 5: .*layer1"):
        data.in_a_process("read", 0, tmp_path, 5)
