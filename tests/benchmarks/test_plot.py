"""Pictures from a small file, and one line about what is missing in a bad one."""

from __future__ import annotations

import json
import re
import sys

import pytest

from benchmarks import plot
from benchmarks.__main__ import main


def spread(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median}


def row(tokens: int, share: float, what: str = "forward", **rest) -> dict:
    found = {
        **dict(tokens=tokens, in_features=16, out_features=24, ranks=[2, 5], run=1, dtype="float32"),
        **dict(open=share, open_share=share, backend="cpu", frozen_seconds=spread(0.5)),
        "pass": what,
        "seconds": {"cpu": spread(0.1 * tokens), "packed": spread(0.2), "compiled loop": spread(0.3)},
        "of_frozen": spread(0.25),
        "roofline": {"seconds": 0.05},
    }
    return found | rest


def results(*rows: dict) -> dict:
    return dict(benchmark="mixture", machine="M", threads=1, torch="2", date="2026-01-01", rows=list(rows))


ALL = results(
    *(row(tokens, 0.5, what) for tokens in (1, 8) for what in ("forward", "both")),
    row(8, 0.25),
    row(8, 1.0, roofline=None),
)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "results.json"


def test_values_that_are_drawn():
    pytest.importorskip("matplotlib")
    found = plot.draw(ALL)
    assert list(found) == ["open-share", "tokens", "overhead"]

    def lines(name: str, panel: int = 0) -> list[list[float]]:
        axes = found[name].axes[panel]
        return [[list(line.get_xdata()), list(line.get_ydata())] for line in axes.get_lines()]

    assert [axes.get_title() for axes in found["tokens"].axes] == ["forward, float32", "both, float32"]
    assert [[0.25, 0.5, 1.0], [800.0, 800.0, 800.0]] in lines("open-share")
    assert [[0.25, 0.5], [50.0, 50.0]] in lines("open-share")  # the roofline, where it is known
    assert [[1, 8], [100.0, 800.0]] in lines("tokens")
    assert [[1, 8], [20.0, 160.0]] in lines("overhead")
    assert [[1, 8], [40.0, 40.0]] in lines("overhead", 1)  # packed


def test_rows_with_dropout_are_not_mixed_with_others():
    pytest.importorskip("matplotlib")
    dropped = [{**row, "dropout": 0.05, "params_fp32": True} for row in ALL["rows"] if row["tokens"] == 8]
    seconds = {"cpu": {"median": 9.0, "low": 9.0, "high": 9.0}}
    both = {**ALL, "rows": ALL["rows"] + [{**row, "seconds": seconds} for row in dropped]}
    (axes, _), (other, _) = (plot.draw(found)["tokens"].axes for found in (ALL, both))
    assert [list(line.get_ydata()) for line in other.get_lines()] == [
        list(line.get_ydata()) for line in axes.get_lines()
    ]


def test_files_are_written(file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file.write_text(json.dumps(ALL))
    out = tmp_path / "pictures"
    main(["plot", str(file), "--out", str(out)])
    names = ["open-share.svg", "overhead.svg", "tokens.svg"]
    assert sorted(path.name for path in out.iterdir()) == names  # nothing else is left there
    first = {name: (out / name).read_bytes() for name in names}
    assert all(b"</svg>" in text for text in first.values())
    main(["plot", str(file), "--out", str(out)])
    assert {name: (out / name).read_bytes() for name in names} == first


def test_what_cannot_be_drawn_is_said(file, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file.write_text(json.dumps(results(row(8, 0.25), row(8, 1.0))))
    main(["plot", str(file), "--out", str(tmp_path)])
    said = capsys.readouterr().out
    assert "tokens.svg: not drawn, for no shape was timed with two numbers of tokens" in said
    assert (tmp_path / "open-share.svg").exists()
    assert not (tmp_path / "tokens.svg").exists()
    file.write_text(json.dumps(results(row(8, 0.25))))
    with pytest.raises(SystemExit, match="nothing to draw"):
        main(["plot", str(file), "--out", str(tmp_path)])


def without(name: str) -> dict:
    bad = row(8, 0.5)
    del bad[name]
    return results(row(1, 0.5), bad)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not written by `python -m benchmarks mixture --json`"),
        (json.dumps({"benchmark": "decode", "rows": [{}]}), "not written by"),
        (json.dumps(results()), "has no rows"),
        (json.dumps(without("open_share")), "row 1 has no open_share"),
        (json.dumps({"benchmark": "mixture", "rows": [row(1, 0.5)]}), "has no machine, threads, torch, date"),
    ],
)
def test_a_bad_file_is_refused_in_a_line(file, text, message):
    file.write_text(text)
    with pytest.raises(SystemExit, match=f"^{re.escape(str(file))}: .*{re.escape(message)}"):
        main(["plot", str(file)])


def test_a_missing_file_is_named(file):
    with pytest.raises(SystemExit, match=r"results.json: No such file"):
        main(["plot", str(file)])


def test_without_matplotlib_it_says_what_to_install(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match=r"pip install 'rode\[plots\]'"):
        main(["plot", str(file)])
