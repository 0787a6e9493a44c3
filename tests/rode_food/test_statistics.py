"""Statistics by hand, whatever the order; pictures and page hold what the numbers say."""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import random
import re
import statistics as plain
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")
from PIL import Image

from rode_food import FoodRecord, Ingredient, Nutrition, Quantity, read_records, write_records
from rode_food.commands import statistics as data_statistics
from rode_food.convert import convert
from rode_food.statistics import BINS, NO_SPLIT, collect
from rode_food.statistics_page import (
    figures,
    number,
    percent,
    summary_rows,
    table1,
    table1_rows,
    write_statistics,
)

FIVE = {"mass": 100.0, "energy": 200.0, "fat": 10.0, "protein": 5.0, "carb": 20.0}


def dish(i: int, **changes: Any) -> FoodRecord:
    return FoodRecord(**{"id": f"d{i}", "image": "/x.jpg", "source": "s", "split": "train", **changes})


def by_hand() -> list[FoodRecord]:
    full = Nutrition(**FIVE, micronutrients={"sodium": Quantity(1.0, "mg"), "iron": Quantity(2.0, "mg")})
    return [
        dish(
            0,
            category="apple_pie",
            ingredients=(
                Ingredient("2 Eggs", amount=2.0, nutrition=Nutrition(**FIVE)),
                Ingredient("eggs", mass=50.0, nutrition=Nutrition(**FIVE)),
            ),
            instructions=("Boil it.", "Eat it hot."),
            nutrition=full,
        ),
        dish(
            1,
            category="Apple pie",
            ingredients=(Ingredient("eggs", amount=1.0), Ingredient("salt"), Ingredient("rice", mass=1.0)),
            instructions=("Stir.",),
            nutrition=Nutrition(mass=300.0, micronutrients={"sodium": Quantity(3.0, "g")}),
        ),
        dish(2, category="soup", source="t", nutrition=Nutrition(**{**FIVE, "mass": 200.0})),
        dish(
            3, split="test", ingredients=(Ingredient("salt"),), nutrition=Nutrition(**{**FIVE, "mass": 80.0})
        ),
        dish(4, split=None),
    ]


def test_counts_by_hand() -> None:
    found = collect(by_hand())
    assert found["records"] == 5
    assert list(found["splits"].items()) == [("train", 3), ("test", 1), (NO_SPLIT, 1)]
    assert found["sources"] == {"s": 4, "t": 1}
    assert found["known"] == {
        "category": 3,
        "ingredients": 3,
        "amounts": 1,
        "recipe": 2,
        "nutrition": 3,
        "ingredient_nutrition": 1,
        "micronutrients": 2,
        "conversation": 0,
    }
    assert found["pictures"] == {"all": 5, "records without": 0, "records with several": 0}
    assert found["categories"] == {
        "distinct": 2,
        "effective": pytest.approx(math.exp(-(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))), rel=1e-5),
        "all": [
            {"name": "apple pie", "records": 2, "train": 2, "test": 0, NO_SPLIT: 0},
            {"name": "soup", "records": 1, "train": 1, "test": 0, NO_SPLIT: 0},
        ],
    }
    assert found["ingredients"] == {
        "distinct": 3,
        "mentions": {"all": 6, "amount": 4, "mass": 2, "nutrition": 2},
        # each name once a record
        "top": [
            {"name": "eggs", "records": 2},
            {"name": "salt", "records": 2},
            {"name": "rice", "records": 1},
        ],
    }
    assert found["micronutrients"] == [
        {"name": "sodium", "records": 2, "units": {"g": 1, "mg": 1}},
        {"name": "iron", "records": 1, "units": {"mg": 1}},
    ]


def test_distributions_by_hand() -> None:
    found = collect(by_hand())
    mass = found["nutrition"]["mass"]
    # 100, 300, 200 and 80; quartiles linear between neighbours
    assert mass["summary"]["all"] == {
        "n": 4, "mean": 170.0, "min": 80.0, "q1": 95.0, "median": 150.0, "q3": 225.0, "max": 300.0,
    }  # fmt: skip
    assert mass["summary"]["train"]["median"] == 200.0
    assert list(mass["summary"]) == ["all", "train", "test"]
    # the 0.99 quantile is 297: ten bins of 50 would be the fewest, so 6 to below 300, and 300 is above
    assert mass["histogram"] == {
        "edges": [0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0],
        "counts": {"train": [0, 0, 1, 0, 1, 0], "test": [0, 1, 0, 0, 0, 0]},
        "above": {"train": 1, "test": 0},
    }
    assert found["nutrition"]["energy"]["summary"]["all"]["n"] == 3  # dish 1 does not say
    lengths = found["lengths"]
    assert lengths["ingredients"]["summary"]["all"]["mean"] == 2.0  # of those that have any
    assert lengths["ingredients"]["histogram"] == {
        "edges": [-0.5, 0.5, 1.5, 2.5, 3.5],
        "counts": {"train": [0, 0, 1, 1], "test": [0, 1, 0, 0]},
        "above": {"train": 0, "test": 0},
    }
    assert lengths["steps"]["summary"]["all"]["max"] == 2.0
    assert lengths["words"]["summary"]["train"]["max"] == 5.0
    # "Boil it.\nEat it hot." has 20 characters, "Stir." 5
    assert (lengths["tokens"]["summary"]["all"]["max"], lengths["tokens"]["summary"]["all"]["min"]) == (
        5.0,
        2.0,
    )


def test_nothing() -> None:
    found = collect([])
    assert found["records"] == 0
    assert set(found["known"].values()) == {0}
    assert found["lengths"] == dict.fromkeys(("ingredients", "steps", "words", "tokens"))
    assert found["nutrition"] == dict.fromkeys(FIVE)
    assert figures(found, 50) == {}
    assert table1_rows(found, "none")[1] == ["none", "0", "0 % (0 classes)", *["0 %"] * 5]


value = st.one_of(st.none(), st.floats(0, 5000, width=32), st.integers(0, 3))
random_dishes = st.lists(
    st.tuples(value, st.sampled_from(["train", "val", None]), st.integers(0, 60), st.integers(0, 4)),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(random_dishes, st.randoms(use_true_random=False))
@example(
    [(1e-8, "train", 0, 0)] * 2, random.Random(0)
)  # its float32 lies just below the histogram's last edge
def test_properties(found: list[tuple], rng: random.Random) -> None:
    records = [
        dish(
            i,
            split=split,
            category=None if kind == 4 else f"c{kind}",
            ingredients=tuple(Ingredient(f"i{chr(97 + j)}") for j in range(min(n, 20))),
            instructions=("ab " * n,) if n else (),
            nutrition=Nutrition(mass=None if mass is None else float(mass)),
        )
        for i, (mass, split, n, kind) in enumerate(found)
    ]
    result = collect(records)
    assert json.dumps(collect(rng.sample(records, len(records)))) == json.dumps(result)
    kinds = Counter(kind for *_, kind in found if kind != 4)
    assert [entry["records"] for entry in result["categories"]["all"]] == sorted(kinds.values(), reverse=True)
    assert 0.999 * bool(kinds) <= result["categories"]["effective"] <= 1.001 * len(kinds)
    masses = sorted(float(mass) for mass, *_ in found if mass is not None)
    for distribution, n in (
        (result["nutrition"]["mass"], len(masses)),
        (result["lengths"]["words"], sum(bool(n) for _, _, n, _ in found)),
    ):
        if not n:
            assert distribution is None
            continue
        summary, histogram = distribution["summary"], distribution["histogram"]
        edges = histogram["edges"]
        assert summary["all"]["n"] == n == sum(s["n"] for name, s in summary.items() if name != "all")
        assert edges == sorted(set(edges))
        assert len(edges) <= BINS + 3
        for split, counts in histogram["counts"].items():
            assert len(counts) == len(edges) - 1
            assert sum(counts) + histogram["above"][split] == summary[split]["n"]
        assert sum(histogram["above"].values()) <= 0.01 * n + 1
    if masses:
        found_summary = result["nutrition"]["mass"]["summary"]["all"]
        assert found_summary["median"] == pytest.approx(plain.median(masses), rel=1e-5)
        assert found_summary["mean"] == pytest.approx(plain.fmean(masses), rel=1e-5)
        if len(masses) > 1:
            q1, _, q3 = plain.quantiles(masses, n=4, method="inclusive")
            assert (found_summary["q1"], found_summary["q3"]) == pytest.approx((q1, q3), rel=1e-4, abs=1e-30)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (12345, "12,345"),
        (320.4, "320"),
        (31.55, "31.6"),
        (1.547, "1.55"),
        (2.0, "2"),
        (0.0042, "0.0042"),
        (123456.7, "123,457"),
        (0, "0"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_percents() -> None:
    assert [percent(*pair) for pair in ((1, 3), (3, 3), (0, 3), (9999, 10000), (1, 10000), (0, 0))] == [
        "33.3 %", "100 %", "0 %", "99.9 %", "0.1 %", "0 %",
    ]  # fmt: skip


def test_table_1() -> None:
    assert table1(collect(by_hand()), "a|b").splitlines() == [
        "| data set | images | category | ingredients | with amounts | recipe | nutrition | by ingredient |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| a\\|b | 5 | 60.0 % (2 classes) | 60.0 % | 20.0 % | 40.0 % | 60.0 % | 20.0 % |",
    ]


def test_a_name_in_table_1_is_shown_as_it_is() -> None:
    row = table1(collect(by_hand()), "<script>alert(1)</script> *a* [b](c) `d` \\").splitlines()[2]
    assert row.startswith(r"| &lt;script&gt;alert(1)&lt;/script&gt; \*a\* \[b\](c) \`d\` \\ | 5 |")


def not_blank(data: bytes) -> None:
    image = Image.open(io.BytesIO(data)).convert("L")
    image.load()
    assert min(image.size) > 100
    dark = sum(image.histogram()[:200]) / (image.width * image.height)
    assert 0.001 < dark < 0.9


def test_files(tmp_path: Path) -> None:
    found = collect(by_hand())
    files = write_statistics(tmp_path / "out", found, name="Über <i>food</i>")
    names = [file.name for file in files]
    assert names == [
        "statistics.json",
        "table1.md",
        "coverage.png",
        "figure3.png",
        "lengths.png",
        "nutrition.png",
        "ingredients.png",
        "statistics.html",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    assert json.loads(files[0].read_text()) == {"name": "Über <i>food</i>", **found}
    page = files[-1].read_text()
    assert "<i>" not in page
    words = re.sub(r'"data:image/png;base64,[^"]+"', "", page)
    assert not re.findall(r'(?:src|href)="|<script|http|url\(', words)
    embedded = [base64.b64decode(d) for d in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]
    assert sorted(embedded) == sorted(file.read_bytes() for file in files if file.suffix == ".png")
    for data in embedded:
        not_blank(data)

    cells = [html.unescape(cell) for cell in re.findall(r"<t[dh]>(.*?)</t[dh]>", page)]
    rows = [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    for key in ("lengths", "nutrition"):
        for distribution in found[key].values():
            summaries = distribution["summary"]
            for split, summary in summaries.items():
                if len(summaries) == 2 and split != "all":
                    continue  # a single split is told once
                told = [number(summary[k]) for k in ("n", "min", "q1", "median", "q3", "max", "mean")]
                assert any(row[1:] == [split, *told] for row in rows), (key, split)
    for count in [*found["known"].values(), *found["ingredients"]["mentions"].values()]:
        assert number(count) in cells
    for entry in found["micronutrients"]:
        assert any(row[:2] == [entry["name"], number(entry["records"])] for row in rows)
    assert "g 1, mg 1" in cells
    for cell in table1_rows(found, "Über <i>food</i>")[1]:
        assert cell in cells
    assert "3 train, 1 test, 1 no split" in page
    assert f"as even as {number(found['categories']['effective'])} equally common ones" in page

    before = {file: file.read_bytes() for file in files}
    write_statistics(tmp_path / "out", found, name="Über <i>food</i>")
    assert {file: file.read_bytes() for file in files} == before


def bars(figure: Any) -> list[tuple[str, float]]:
    (axes,) = figure.axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    return list(zip(labels, [patch.get_width() for patch in axes.patches], strict=True))


def test_what_is_drawn() -> None:
    records = [
        dish(i, category="x" * 50 if i < 9 else f"c${i}", ingredients=(Ingredient("a" if i % 2 else "b"),))
        for i in range(20)
    ]
    drawn = figures(collect(records), 3)
    assert list(drawn) == ["coverage", "figure3", "lengths", "ingredients"]
    # ties by name, what is beyond the top together, long names cut short
    assert bars(drawn["figure3"]) == [
        ("x" * 35 + "…", 9),
        ("c$10", 1),
        ("c$11", 1),
        ("9 other categories", 9),
    ]
    assert [text.get_text() for text in drawn["figure3"].axes[0].texts] == [
        "9  (45.0 %)", "1  (5.0 %)", "1  (5.0 %)", "9  (45.0 %)",
    ]  # fmt: skip
    assert bars(figures(collect(records), 50)["figure3"])[-1] == ("c$9", 1)
    assert bars(drawn["ingredients"]) == [("a", 10), ("b", 10)]
    (panel,) = drawn["lengths"].axes
    shares = [patch.get_data() for patch in panel.patches]
    assert shares[-1].values.tolist() == [0.0, 100.0]
    assert shares[-1].edges.tolist() == [-0.5, 0.5, 1.5]


def test_each_split_is_drawn_in_shares_of_its_own() -> None:
    records = [dish(i, nutrition=Nutrition(mass=float(i % 2))) for i in range(100)]
    records += [dish(i, split="test", nutrition=Nutrition(mass=1.0)) for i in range(100, 104)]
    figure = figures(collect(records), 1)["nutrition"]
    (panel,) = figure.axes
    visible = {
        patch.get_label(): patch.get_data()
        for patch in panel.patches
        if patch.get_label() in ("train", "test")
    }
    assert visible["train"].values[0] == 50
    assert (visible["test"].values[0], sum(visible["test"].values)) == (0, 100)
    medians = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "o"]
    quartiles = [list(line.get_xdata()) for line in panel.lines if line.get_marker() != "o"]
    assert medians == [0.5, 1.0]
    assert quartiles == [[0.0, 1.0], [1.0, 1.0]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "test"]


def test_one_split_is_told_once() -> None:
    rows = summary_rows(collect([dish(0, nutrition=Nutrition(**FIVE))])["nutrition"])
    assert [row[1] for row in rows[1:]] == ["all"] * 5
    assert rows[1] == ["mass, g", "all", "1", *["100"] * 6]


def command(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    data_statistics.add_parser(parser.add_subparsers())
    args = parser.parse_args(["statistics", *argv])
    return args.run(args)


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "r.jsonl", tmp_path / "out"
    write_records(source, by_hand())
    assert command(str(source), str(out), "--figure3-top", "1") == 0
    said = capsys.readouterr().out
    assert said == (out / "table1.md").read_text() + f"statistics in {out / 'statistics.html'}\n"
    assert "| s, t | 5 |" in said
    assert "the 1 commonest" in (out / "statistics.html").read_text()
    source.write_text("")
    with pytest.raises(ValueError, match=r"r.jsonl: no records in it"):
        command(str(source), str(out))
    with pytest.raises(ValueError, match="top: expected at least 1 category, got 0"):
        write_statistics(out, collect(by_hand()), name="x", top=0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"figures need matplotlib: pip install 'rode\[plots\]'"):
        command("/nowhere", str(out))


@pytest.mark.data
def test_real_records(rode_data: Path, tmp_path: Path) -> None:
    photos, plates = tmp_path / "photos.jsonl", tmp_path / "plates.jsonl"
    convert("food-photos", rode_data / "food_photos", photos, on_bad_image="skip")
    convert("nutrition5k-jsonl", rode_data / "nutrition5k", plates)
    found = collect(read_records(photos))
    assert (found["records"], found["known"]["recipe"], found["known"]["nutrition"]) == (201, 201, 0)
    assert found["categories"]["all"][0]["name"] == "meat dish"
    assert found["ingredients"]["top"][0]["name"] == "salt"
    # counted from the file itself
    steps = [len(json.loads(line)["instructions"]) for line in photos.read_text().splitlines()]
    assert found["lengths"]["steps"]["summary"]["all"]["median"] == plain.median(steps)
    assert [f.name for f in write_statistics(tmp_path / "a", found, name="photos")][2:6] == [
        "coverage.png", "figure3.png", "lengths.png", "ingredients.png",
    ]  # fmt: skip
    weighed = collect(read_records(plates))
    masses = [json.loads(line)["nutrition"]["mass"] for line in plates.read_text().splitlines()]
    assert weighed["nutrition"]["mass"]["summary"]["all"]["max"] == pytest.approx(max(masses), rel=1e-5)
    assert weighed["known"]["ingredient_nutrition"] == weighed["records"] == len(masses)
    for file in write_statistics(tmp_path / "b", weighed, name="plates"):
        if file.suffix == ".png":
            not_blank(file.read_bytes())
