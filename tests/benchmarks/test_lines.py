from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import lines
from benchmarks.__main__ import main
from benchmarks.lines import Label, amount_right, is_junk, kept_apart, name_right, read_labels
from tagger import need_tagger


def label(text: str = "x", name: str = "flour", quantity: str = "1", unit: str = "cup") -> Label:
    return Label("s", text, name, quantity, unit)


@pytest.mark.parametrize(
    ("quantity", "unit", "amount", "right"),
    [
        ("1#1$2", "cup", 1.5, True),
        ("#1$4", "cup", 0.25, True),
        ("1-2", "", 1.5, True),
        ("1 2", "lb oz", 1.125, True),
        ("2x 400 14", "g oz tin", 2.0, True),
        ("", "", None, True),
        ("2", "cup", None, False),
        ("", "", 3.0, False),
        ("#1$4", "cup", 14.0, False),
        ("2 dozen", "", 24.0, True),
    ],
)
def test_amounts(quantity, unit, amount, right):
    assert amount_right(label(quantity=quantity, unit=unit), amount) is right


@pytest.mark.parametrize(
    ("wanted", "name", "right"),
    [
        ("Plain Flours", "plain flour", True),
        ("butter or oil", "butter", True),
        ("beef or chicken stock", "beef stock", True),
        ("smoked paprika pimenton", "smoked paprika (pimenton)", True),
        ("boiling water", "water", True),
        ("butter or oil", "lard", False),
        ("plain flour", "flour", False),
    ],
)
def test_names(wanted, name, right):
    assert name_right(label(name=wanted), name) is right


@pytest.mark.parametrize(
    ("name", "junk"),
    [("x 400g tin", True), ("2oz flour", True), ("c", True), ("flour", False), ("canned flour", False)],
)
def test_junk(name, junk):
    assert is_junk(label(), name) is junk


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need_tagger()
    (tmp_path / "site.csv").write_text(
        "input,name,quantity,unit\n1/4 cup (30 g) flour,flour,#1$4,cup\nFor the sauce:,sauce,,\nsalt,,,\n2 eggs,eggs,2,\n"
    )
    found = read_labels(tmp_path)
    assert [x.source for x in found] == ["site"] * 4
    main(["lines", "--folder", str(tmp_path), "--unlabelled", "--errors", str(tmp_path / "e.tsv")])
    printed = capsys.readouterr().out
    assert f"whole    {'site':14} {3:6} {33.33:7.2f} {66.67:9.2f} {66.67:7.2f} {0:7.2f}" in printed
    assert "of 1 lines without a label 0 are lost: []" in printed
    assert (tmp_path / "e.tsv").read_text().startswith("lost,amount,name\tFor the sauce:")
    with pytest.raises(SystemExit, match="expected CSV files of labelled lines, found none"):
        main(["lines", "--folder", str(tmp_path / "none")])


def test_a_tenth_is_kept_apart():
    apart = sum(kept_apart(str(n)) for n in range(2000))
    assert 140 < apart < 260
    assert set(lines.READERS) == {"simple", "whole"}
