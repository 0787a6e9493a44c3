from __future__ import annotations

import argparse
import hashlib
import json

import pytest

from rode_food.commands import audit as data_audit
from rode_food.records import FoodRecord, Ingredient, Nutrition, write_records
from tagger import need_tagger
from tiny_usda import REAL_NUMBERS, write_sr28_csv


def run(*words):
    parents = argparse.ArgumentParser(add_help=False)
    parents.add_argument("--quiet", action="store_true")
    parser = argparse.ArgumentParser()
    data_audit.add_parser(
        parser.add_subparsers(), formatter_class=argparse.RawDescriptionHelpFormatter, parents=[parents]
    )
    args = parser.parse_args(list(map(str, words)))
    return args.run(args)


@pytest.fixture
def usda(tmp_path):
    need_tagger()
    folder = tmp_path / "usda"
    folder.mkdir()
    write_sr28_csv(folder, REAL_NUMBERS)
    return folder


def test_audit_nutrition(usda, tmp_path, capsys):
    rice = Ingredient("white rice", 160.0, "g", 160.0, Nutrition(160, 208, 0.32, 4, 44.8))
    record = FoodRecord("d", "d.jpg", "s", ingredients=(rice,), nutrition=rice.nutrition, split="test")
    write_records(tmp_path / "r.jsonl", [record])
    files = ("--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
    command = ("audit-nutrition", "--quiet", tmp_path / "r.jsonl", "--usda", usda)
    assert run(*command, "--state", "served", "--split", "test", *files) == 0
    assert "dishes that agree: 1 of 1 (100.0 %)" in capsys.readouterr().out
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["groups"]["Grains"]["pmae"]["energy"] == pytest.approx(0)  # boiled
    assert "Grains" in (tmp_path / "a.html").read_text()
    assert run(*command, "--json", tmp_path / "raw.json") == 0
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert raw["groups"]["Grains"]["bias"]["energy"] == pytest.approx(100 * (130 - 360) / 360)
    assert raw["counts"]["dishes_agreeing"] == 0
    # a tolerance that lets it pass is read
    assert run(*command, "--tolerance", "0.95", "--json", tmp_path / "wide.json") == 0
    assert json.loads((tmp_path / "wide.json").read_text())["counts"]["dishes_agreeing"] == 1


def test_audit_matching(usda, tmp_path, capsys):
    line = "2 cups flour"
    (tmp_path / "recipes.json").write_text(json.dumps([{"id": "cake", "ingredients": [line]}]))
    labels = tmp_path / "labels.csv"
    labels.write_text(
        "file,recipe,field,line,sha256,accepted,grams_min,grams_max\n"
        f"recipes.json,cake,ingredients,0,{hashlib.sha256(line.encode()).hexdigest()[:12]},20081,240,240\n"
    )
    out = tmp_path / "p.json"
    assert run("audit-matching", tmp_path, "--usda", usda, "--labels", labels, "--json", out) == 0
    assert "right, of those matched by map: 1 of 1 = 100 %" in capsys.readouterr().out
    assert json.loads(out.read_text())["grams"]["hits"] == 1


def test_review_without_a_page(tmp_path):
    with pytest.raises(ValueError, match=r"has no review.html"):
        run("review", tmp_path, "--no-browser")


def test_audit_needs_tables(tmp_path):
    write_records(tmp_path / "r.jsonl", [])
    with pytest.raises(ValueError, match=r"is not a folder; download USDA's SR Legacy"):
        run("audit-nutrition", "--quiet", tmp_path / "r.jsonl", "--usda", tmp_path / "none")
