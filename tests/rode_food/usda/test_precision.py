from __future__ import annotations

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rode_food.usda import Estimator, load_foods
from rode_food.usda.precision import Label, measure, read_labels, report, wilson

HEAD = "file,recipe,field,line,sha256,accepted,grams_min,grams_max"


def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write(folder, *rows):
    (folder / "recipes.json").write_text(
        json.dumps([{"id": "cake", "ingredients": ["2 cups flour", "3 eggs"]}])
    )
    path = folder / "labels.csv"
    path.write_text("\n".join([HEAD, *rows]) + "\n")
    return path


def test_labels_find_their_lines(tmp_path):
    path = write(
        tmp_path,
        f"recipes.json,cake,ingredients,0,{sha('2 cups flour')},00001 00007,240,250",
        f"recipes.json,cake,ingredients,1,{sha('3 eggs')},-,,",
    )
    assert read_labels(tmp_path, path) == [
        Label("2 cups flour", frozenset({"00001", "00007"}), (240.0, 250.0)),
        Label("3 eggs", frozenset({None}), None),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            f"recipes.json,cake,ingredients,0,{sha('another')},00001,,",
            r"labels.csv:2: the line in recipes.json is another",
        ),
        (f"recipes.json,pie,ingredients,0,{sha('x')},00001,,", r"labels.csv:2: no such line in recipes.json"),
        (f"recipes.json,cake,ingredients,7,{sha('x')},00001,,", r"labels.csv:2: no such line"),
    ],
)
def test_labels_that_do_not_fit(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_labels(tmp_path, write(tmp_path, row))


def test_labels_with_other_columns(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match=r"labels.csv:1: expected the columns file,recipe"):
        read_labels(tmp_path, path)


def test_measure(tiny):
    labels = [
        Label("2 cups flour", frozenset({"00001"}), (240, 240)),  # right, and so are its grams
        Label("2 eggs", frozenset({"00009"}), (50, 60)),  # wrong by the map; 88 g are off
        Label("winter squash", frozenset({"00011"}), None),  # right, automatic
        Label("1 tsp unicorn", frozenset({"00001"}), (3, 3)),  # missed
        Label("1 cup moonlight", frozenset({None}), None),  # rightly nothing
        Label("1 clove garlic", frozenset({"00003"}), None),  # grams where the label has none
    ]
    result = measure(labels, tiny)
    assert {k: (v["hits"], v["of"]) for k, v in result["precision"].items()} == {
        "map": (2, 3),
        "automatic": (1, 1),
        "both": (3, 4),
    }
    assert {k: (v["hits"], v["of"]) for k, v in result["coverage"].items()} == {"map": (3, 5), "both": (4, 5)}
    assert (result["grams"]["hits"], result["grams"]["of"]) == (1, 2)
    assert (result["grams_coverage"]["hits"], result["grams_coverage"]["of"]) == (2, 3)
    assert result["grams_unfounded"] == 1
    assert [row["line"] for row in result["wrong"]] == ["2 eggs"]
    assert "right, of those matched by map: 2 of 3 = 67 % (95 %: 21 to 94)" in report(result)


def test_wilson_by_hand():
    # Wilson (1927), for 8 of 10: 49.0 to 94.3 %
    assert wilson(8, 10) == pytest.approx((49.02, 94.33), abs=0.01)
    assert wilson(0, 0) == (0.0, 100.0)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share(case):
    hits, count = case
    low, high = wilson(hits, count)
    assert 0 <= low <= 100 * hits / count + 1e-9
    assert 100 * hits / count - 1e-9 <= high <= 100


@pytest.mark.data
@pytest.mark.usefixtures("parser")
def test_the_hundred_lines(rode_data):
    labels = read_labels(rode_data / "food_photos")
    assert len(labels) == 100
    result = measure(labels, Estimator(load_foods(rode_data / "usda")))
    # docs/golden.md has these
    assert (result["precision"]["map"]["hits"], result["precision"]["map"]["of"]) == (82, 82)
    assert (result["precision"]["automatic"]["hits"], result["precision"]["automatic"]["of"]) == (5, 7)
    assert (result["grams"]["hits"], result["grams"]["of"]) == (80, 80)
    assert result["grams_coverage"]["of"] == 90
    assert result["grams_unfounded"] == 0
