"""Means and spreads against numbers worked out by hand; what was not run or not measured is empty."""

from __future__ import annotations

import json

import pytest

from rode.paper.report import make_cell


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table(text):
    """Rows of a Markdown table by their first cell; the heading has the key None."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return {None: cells(lines[0]), **{cells(line)[0]: cells(line)[1:] for line in lines[2:]}}


def test_mean_and_spread_by_hand():
    results = [{"metrics": {"a": value}} for value in (9.0, 10.0, 12.0, None)] + [{"metrics": {}}]
    cell = make_cell(results, "a", 9.48)
    # 31 / 3; deviations -4/3, -1/3, 5/3: (16 + 1 + 25) / 9 / 2 = 7/3
    assert cell.values == (9.0, 10.0, 12.0)
    assert cell.mean == pytest.approx(31 / 3)
    assert cell.spread == pytest.approx((7 / 3) ** 0.5)
    assert str(cell) == "10.33 ± 1.53"
    assert str(make_cell(results[:1], "a", None)) == "9.00"  # of one run no spread
    assert str(make_cell([], "a", 9.48)) == str(make_cell(results, "b", 9.48)) == ""


def test_ours_beside_the_papers(capsys, processes, reproduce, tmp_path):
    assert reproduce("table5", "--only", "relu-8888", "--seeds", "0", "1", "2") == 0
    assert reproduce("table5", "--only", "softmax-8888") == 0
    capsys.readouterr()
    assert reproduce("table5", "--no-run") == 0
    assert processes.steps()[-1] == ("evaluate", "softmax-8888-seed0", False)
    out = capsys.readouterr().out
    rows = table(out)
    heading = ["", "SacreBLEU", "paper", "ROUGE-L", "paper", "IoU", "paper", "pMAE", "paper"]
    assert rows[None] == [*heading, "trainable parameters", "seeds"]
    # only SacreBLEU was measured
    assert rows["8,8,8,8 relu"] == [
        "10.33 ± 1.53",
        "9.48",
        "",
        "40.03",
        "",
        "26.7",
        "",
        "52.75",
        "32,000",
        "3",
    ]
    assert rows["8,8,8,8 softmax"] == ["8.00", "8.7", "", "38.5", "", "24.54", "", "53.66", "32,000", "1"]
    assert rows["2,4,6,8 relu"] == ["", "9.4", "", "39.67", "", "26.76", "", "52.63", "", ""]
    assert "- mean ± sample standard deviation over seeds" in out
    assert "- less is better: pMAE" in out
    assert "ours is small, another model or other data than the paper's" in out

    folder = tmp_path / "results" / "small"
    assert (folder / "table5.md").read_text().strip() in out
    report = json.loads((folder / "table5.json").read_text())
    by_variant = {row["variant"]: row for row in report["rows"]}
    cell = by_variant["relu-8888"]["cells"]["sacrebleu"]
    assert cell == {
        "values": [9.0, 10.0, 12.0],
        "mean": 31 / 3,
        "spread": pytest.approx((7 / 3) ** 0.5),
        "paper": 9.48,
    }
    assert [run["seed"] for run in by_variant["relu-8888"]["runs"]] == [0, 1, 2]
    assert by_variant["relu-2468"]["cells"]["sacrebleu"]["mean"] is None
    assert by_variant["relu-2468"]["runs"] == []

    assert reproduce("table5", "--no-run", "--seeds", "1", "2") == 0
    assert table(capsys.readouterr().out)["8,8,8,8 relu"][0] == "11.00 ± 1.41"
    assert reproduce("table2", "--no-run") == 0  # more metrics than rows: the metrics go down
    rows = table(capsys.readouterr().out)
    assert rows[None] == ["", "FoodLMM", "paper", "FoodLMM+MoE", "paper", "RoDE", "paper"]
    assert rows["SacreBLEU"] == ["", "7.59", "8.00", "8.7", "", "9.66"]
    assert rows["pMAE carb"] == ["", "51.25", "", "51.87", "", "48.65"]
    assert rows["trainable parameters"] == ["", "", "32,000", "", "", ""]
    assert rows["seeds"] == ["", "", "1", "", "", ""]


def test_runs_that_do_not_compare_are_named(capsys, processes, reproduce, tmp_path):
    assert reproduce("table4", "--only", "lora-8") == 0
    assert reproduce("table4", "--only", "lora-32", "--seeds", "0", "training.max_steps=9") == 0
    assert reproduce("table4", "--only", "lora-8", "--seeds", "1", "adapter.alpha=4") == 0
    out = capsys.readouterr().out.rpartition("Table 4")[2]  # what was run before is shown too
    assert "- lora-32 seed 0 was not run as lora-8 seed 0 was: training.max_steps: 9 (was 6)" in out
    assert "- lora-8 seed 1 was not run as lora-8 seed 0 was: adapter.alpha: 4.0 (was 16.0)" in out
    assert out.count("was not run as") == 2  # ranks and seeds may differ
