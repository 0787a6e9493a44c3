"""Figures: the numbers that are drawn, and that nothing is drawn for what was not run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
from rode.paper.figures import draw, mean_heat_map, save
from rode.paper.report import make_report
from rode.paper.results import read_results
from rode.paper.tables import read_tables

CONFIGS = Path(__file__).parents[3] / "configs" / "paper"


@pytest.fixture
def drawn(tmp_path):
    """The figure of what is in tmp_path's results."""
    tables = read_tables(CONFIGS)

    def make(what):
        results = read_results(tmp_path / "results", "small", tables.item(what).variants)
        return draw(make_report(tables, what, results, "small"), results, tables)

    return make


def test_the_mean_heat_map_by_hand():
    def result(blocks, rows):
        return {"gates": {"all": {"blocks": blocks, "mean_gate": rows}}}

    results = [result([0, 2], [[1.0, 2.0], [3.0, None]]), result([0], [[2.0, 4.0]]), {"gates": None}]
    assert mean_heat_map(results) == ([0, 2], [[1.5, 3.0], [3.0, None]])
    assert mean_heat_map([]) == ([], [])


def test_figure_6(processes, reproduce, drawn, tmp_path):
    assert reproduce("fig6", "--only", "relu-8888", "--seeds", "0", "1") == 0
    left, right, *bars = drawn("fig6").axes
    assert (left.get_title(), right.get_title()) == ("8,8,8,8 softmax", "8,8,8,8 relu")
    assert len(left.images) == 0
    assert [text.get_text() for text in left.texts] == ["not run"]
    # seeds 0 and 1: gates 0 and 1 more by a quarter for each expert
    assert right.images[0].get_array().tolist() == [[0.5, 0.75, 1.0, 1.25]] * 2
    assert [label.get_text() for label in right.get_xticklabels()] == ["r=8"] * 4
    assert len(bars) == 1
    folder = tmp_path / "results" / "small"
    assert (folder / "fig6.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == ["fig6.json", "fig6.md", "fig6.png", "relu-8888"]


def heights(axes):
    return [
        patch.get_height() for container in axes.containers for patch in getattr(container, "patches", ())
    ]


def test_figure_7(processes, reproduce, drawn):
    assert reproduce("fig7", "--only", "relu-8888", "softmax-8888", "--seeds", "0", "1", "2") == 0
    axes = drawn("fig7").axes
    assert [a.get_title() for a in axes][::3] == ["SacreBLEU (more is better)", "pMAE (less is better)"]
    # top-1 was not run: its only bar is the paper's
    assert heights(axes[0]) == pytest.approx([8.28, 24.5 / 3, 8.7, 31 / 3, 9.48])
    assert heights(axes[1]) == [37.2, 38.5, 40.03]
    spreads = [
        seg[1][1] - seg[0][1]
        for c in axes[0].containers
        if hasattr(c, "lines")
        for seg in c.lines[2][0].get_segments()
    ]
    # deviations of 8, 8, 8.5 from 49/6: 1/6, 1/6, 1/3: (1 + 1 + 4) / 36 / 2
    assert spreads == pytest.approx([2 * (1 / 12) ** 0.5, 2 * (7 / 3) ** 0.5])


def test_figure_8(processes, reproduce, drawn):
    assert reproduce("fig8", "--only", "relu-2468", "lora-8", "--seeds", "1") == 0
    axes = drawn("fig8").axes
    above, below = axes[0], axes[4]

    def points(axes):
        return [tuple(float(v[0]) for v in c.lines[0].get_data()) for c in axes.containers]

    assert points(below) == [(8000.0, 1.0), (20000.0, 1.0)]
    assert len(points(above)) == 9
    assert points(above)[0] == (4_194_304.0, 7.59)
    assert points(above)[-1] == (16_777_216.0, 9.66)
    legend = drawn("fig8").legends[0]
    styles = {
        text.get_text(): (line.get_color(), line.get_marker())
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert len(set(styles.values())) == 9
    assert styles["8,8,8,8 relu"][0] == styles["2,4,6,8 relu"][0]
    assert styles["2,4,6,8 softmax"][1] == styles["2,4,6,8 relu"][1]
    assert [text.get_text() for text in axes[5].texts] == ["not run"]  # ROUGE-L was not measured


def test_one_set_of_numbers_is_one_picture(drawn, tmp_path):
    first, second = (save(drawn("fig8"), tmp_path / name, "f").read_bytes() for name in "ab")
    assert first == second


def test_tables_are_not_drawn_and_matplotlib_is_asked_for(capsys, monkeypatch, processes, reproduce, drawn):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert drawn("table5") is None
    assert reproduce("fig7", "--no-run") == 1
    said = capsys.readouterr()
    assert said.err.strip().endswith("rode: figures need matplotlib: pip install 'rode[plots]'")
    assert "8.28" in said.out  # the numbers are shown all the same
