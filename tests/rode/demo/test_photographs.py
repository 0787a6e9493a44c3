"""What the runs on real photographs share: records that are the same everywhere, splits by object, the probe."""

from __future__ import annotations

import gzip
import json
from collections import Counter

import pytest
import torch

from rode.demo import cases
from rode.demo.photographs import fewer_photographs, make_records, naming_examples, split_dishes
from rode.demo.probe import ridge
from rode_food.readers.weighed_food import choices
from rode_food.records import FoodRecord, read_records
from tiny_llava import draw
from tiny_usda import write_sr28_csv


@pytest.fixture
def data(tmp_path):
    """Three small folders: 12 apples and 12 pears of 20 photographs, groceries, 60 dishes."""
    folder = tmp_path / "data"
    entries = {
        "weighed_food": [
            {
                "id": f"{food}{i}_{n}",
                "image": f"images/{food}.png",
                "object": f"{food}{i}",
                "foods": [{"food": food, "grams": 100 + i, "volume_ml": None}],
            }
            for food in ("apple", "pear")
            for i in range(12)
            for n in range(20)
        ],
        "grocery_store": [
            {"id": f"{s}_{k}", "image": "images/a.png", "split": s, "product": f"{k} 1", "kind": k}
            for k in ("Milk", "Juice")
            for s in ("train", "val", "test")
        ],
        "food_photos": [
            {
                "id": f"dish{i}",
                "title": "Soup",
                "image": "images/a.png",
                "ingredients": ["1 onion"],
                "instructions": ["Boil it."],
            }
            for i in range(60)
        ],
    }
    for name, listed in entries.items():
        (folder / name / "images").mkdir(parents=True)
        (folder / name / "photos.json").write_text(json.dumps(listed))
        for picture in {entry["image"] for entry in listed}:
            draw(folder / name / picture, (200, 30, 30))
    (folder / "usda").mkdir()
    write_sr28_csv(folder / "usda", {"00002": choices()["apple"].ndb_no, "00005": choices()["pear"].ndb_no})
    return folder


def test_records(data, tmp_path):
    files = make_records(data, tmp_path / "out")
    records = {kind: list(read_records(file)) for kind, file in files.items()}
    assert Counter(r.split for r in records["food-photos"]) == {"train": 20, "val": 10, "test": 30}
    assert Counter(r.split for r in records["grocery-store"]) == {"train": 2, "val": 2, "test": 2}
    per_object = Counter((r.split, r.id.partition("/")[0]) for r in records["weighed-food"])
    assert {
        split: {n for (s, _), n in per_object.items() if s == split} for split in ("train", "val", "test")
    } == {
        "train": {20},
        "val": {16},
        "test": {16},
    }
    assert all(r.nutrition.complete for r in records["weighed-food"])
    line = json.loads(files["weighed-food"].read_text().splitlines()[0])
    assert line["image"] == "data/weighed_food/images/apple.png"  # the same file on every machine
    before = {kind: file.read_bytes() for kind, file in files.items()}
    assert {kind: file.read_bytes() for kind, file in make_records(data, tmp_path / "out").items()} == before

    named = naming_examples(files)
    assert {name for example in named for name in example.reference} == {"apple", "pear", "milk", "juice"}
    assert {(example.task, example.split) for example in named} == {("ingredients", "train")}


def test_cases_are_chosen_by_their_names_and_shown_with_every_answer(data, tmp_path, capsys):
    folder, results = tmp_path / "out", tmp_path / "results" / "photographs"
    make_records(data, folder)
    chosen = cases.chosen(folder)
    assert Counter(e.task for e in chosen) == {"ingredients": 4, "nutrition": 2, "category": 2, "recipe": 2}
    assert [e.record_id for e in cases.chosen(folder)] == [e.record_id for e in chosen]
    groups = [e.record_id.partition("/")[0] for e in chosen]
    assert len(set(groups)) == len(groups)
    command = [str(folder), "--results", str(results), "--variants", "a", "b"]
    with pytest.raises(
        FileNotFoundError, match=r"seed-0\.answers\.jsonl\.gz: no such file; run `rode reproduce"
    ):
        cases.main(command)
    for variant in ("a", "b"):
        (results / variant).mkdir(parents=True)
        rows = [[e.record_id, e.source, e.task, f"{variant} says <{e.task}>", {}] for e in chosen]
        packed = gzip.compress("\n".join(map(json.dumps, rows)).encode())
        (results / variant / "seed-0.answers.jsonl.gz").write_bytes(packed)
    assert cases.main(command) == 0
    shown, page = capsys.readouterr().out, (folder / "report.html").read_text()
    for example in chosen:
        assert f"**{example.record_id}** ({example.source}): {example.question}" in shown
        assert f"- b: b says <{example.task}>" in shown
    assert page.count("data:image/jpeg") == len(chosen)
    assert "a says &lt;recipe&gt;" in page
    (results / "b" / "seed-0.answers.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    with pytest.raises(ValueError, match="b seed 0: expected an answer about"):
        cases.main(command)


def test_splits_do_not_depend_on_the_order():
    records = [FoodRecord(id=f"{i}", image="a", source="s") for i in range(50)]
    first = {r.id: r.split for r in split_dishes(records)}
    assert {r.id: r.split for r in split_dishes(records[::-1])} == first
    held_out = [FoodRecord(id=f"o/{i}", image="a", source="s", split="test") for i in range(30)]
    assert {r.id for r in fewer_photographs(held_out, 8)} == {
        r.id for r in fewer_photographs(held_out[::-1], 8)
    }


def test_ridge_is_least_squares_with_a_penalty():
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(50, 6, generator=generator).double(), torch.ones(50, 1).double()], dim=1)
    y = torch.randn(50, 3, generator=generator).double()
    free = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(ridge(x, y, 1e-9), free)
    strong = ridge(x, y, 1e12)
    torch.testing.assert_close(strong[:-1], torch.zeros(6, 3).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(strong[-1], y.mean(0))
    # the gradient of what is minimised
    weights = ridge(x, y, 7.0)
    slope = x.T @ (x @ weights - y) + 7.0 * torch.cat([weights[:-1], torch.zeros(1, 3).double()])
    torch.testing.assert_close(slope, torch.zeros_like(slope), atol=1e-7, rtol=0)
