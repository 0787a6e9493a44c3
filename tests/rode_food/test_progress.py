from __future__ import annotations

import pytest

from rode_food import progress
from rode_food.progress import Progress


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at each step."""
    monkeypatch.setattr(progress, "_BETWEEN", 0.0)
    monkeypatch.setattr(progress, "_BEFORE", 0.0)


def test_without_a_terminal_there_are_plain_lines(soon: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(range(3), desc="answers", unit="answer")) == [0, 1, 2]
    with Progress(total=4, desc="gates", unit="example") as bar:
        bar.update(4)
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert all(line.startswith(("answers: ", "gates: ")) for line in lines)
    assert lines[-1].startswith("gates: 4 of 4 example in ")
    assert any(line.startswith("answers: 3 of 3 answer in ") for line in lines)


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(Progress(iter("abc"), desc="letters")) == ["a", "b", "c"]
    assert list(Progress(range(3), show=False)) == [0, 1, 2]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(Progress(range(3), desc="answers")) == [0, 1, 2]
    said = capsys.readouterr().err
    assert "\r" in said
    assert "100%" in said
