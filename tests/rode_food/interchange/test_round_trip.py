"""Records written in a format of others and read again ask and answer the same."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rode.cli import main
from rode_food import make_examples, read_records, write_records
from rode_food.convert import convert
from rode_food.export import FORMATS, export
from rode_food.readers import read_source
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient, Nutrition, Turn

texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda text: text.strip() and "<image>" not in text
)
turns = st.lists(st.builds(Turn, texts, texts), max_size=3).map(tuple)
images = st.lists(st.sampled_from(["a.jpg", "b c.png", "below/ü.jpg", "../beside.jpg"]), max_size=3)
dishes = st.builds(
    lambda images, **fields: (images, fields),
    images,
    source=texts.filter(lambda text: text != "all"),
    category=st.none() | texts,
    ingredients=st.lists(st.builds(Ingredient, texts), max_size=2).map(tuple),
    instructions=st.lists(texts, max_size=2).map(tuple),
    nutrition=st.none() | st.just(Nutrition(200.0, 300.0, 1.5, 2.0, 3.0)),
    split=st.sampled_from([None, "train", "val", "test"]),
    conversation=turns,
)


def asked(records, **options):
    return Counter(
        (e.images, e.question, e.answer, e.source, e.split)
        for record in records
        for e in make_examples(record, **options)
    )


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("wording", ["first", "all"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(dishes, max_size=4))
def test_the_same_questions_and_answers(tmp_path: Path, to: str, wording: str, made: list) -> None:
    records = []
    for number, (names, fields) in enumerate(made):
        first, *more = [str((tmp_path / "data" / name).resolve()) for name in names] or [""]
        records.append(FoodRecord(f"r{number}", first, more_images=tuple(more), **fields))
    out = tmp_path / "data" / "out.json"
    done = export(records, out, to, wording=wording)
    log = ReadLog(strict=True)
    found = list(read_source(to, out, log))
    resolved = [
        FoodRecord(**{**vars(r), "image": "" if not r.image else str(Path(r.image).resolve())}) for r in found
    ]
    resolved = [
        FoodRecord(**{**vars(r), "more_images": tuple(str(Path(i).resolve()) for i in r.more_images)})
        for r in resolved
    ]
    assert asked(resolved) == asked(records, wording=wording)
    assert done.entries == len(found)
    assert done.questions == sum(len(record.conversation) for record in found)
    assert not log.counts
    assert not log.notes
    silent = sum(not make_examples(record) for record in records)
    assert done.left_out == ({"no question": silent} if silent else {})


RECORD = FoodRecord(
    "egg",
    "/data/images/egg.jpg",
    "kitchen",
    category="breakfast",
    split="train",
    more_images=("/data/side.jpg",),
    conversation=(Turn("What is it?", "An egg."), Turn("Fried?", "Yes.")),
)


def test_known_llava_instruct(tmp_path: Path) -> None:
    alone = FoodRecord("text", "", "kitchen", conversation=(Turn("1 + 1?", "2"),))
    write_records(tmp_path / "r.jsonl", [RECORD, alone])
    arguments = ["--to", "llava-instruct", str(tmp_path / "r.jsonl"), str(tmp_path / "out.json")]
    assert main(["data", "export", *arguments]) == 0
    up = "../" * (len(tmp_path.resolve().parts) - 1)
    images = [f"{up}data/images/egg.jpg", f"{up}data/side.jpg"]
    assert json.loads((tmp_path / "out.json").read_text()) == [
        {
            "id": "egg",
            "image": images,
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nWhat is it?"},
                {"from": "gpt", "value": "An egg."},
                {"from": "human", "value": "Fried?"},
                {"from": "gpt", "value": "Yes."},
            ],
            "source": "kitchen",
            "split": "train",
        },
        {
            "id": "egg/category",
            "image": images,
            "conversations": [
                {"from": "human", "value": "<image>\n<image>\nWhat kind of dish is this?"},
                {"from": "gpt", "value": "breakfast"},
            ],
            "source": "kitchen",
            "split": "train",
        },
        {
            "id": "text",
            "conversations": [{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}],
            "source": "kitchen",
        },
    ]


def test_known_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "r.jsonl", [RECORD])
    arguments = ["--to", "messages", str(tmp_path / "r.jsonl"), str(tmp_path / "out.jsonl")]
    assert main(["data", "export", *arguments, "--tasks", "category", "--split", "train"]) == 0
    assert capsys.readouterr().out == "wrote 1 entries with 1 questions\n"
    (row,) = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["messages"] == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "What kind of dish is this?"},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "breakfast"}]},
    ]
    assert main(["data", "export", *arguments, "--tasks", "category", "--wordings", "all"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"egg/category/{n}" for n in range(1, 6)]
    assert main(["data", "export", *arguments, "--tasks", "recipe"]) == 0
    assert "wrote 0 entries with 0 questions; left out 1 with no question" in capsys.readouterr().out


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="to: expected one of llava-instruct, messages, got 'x'"):
        export([], tmp_path / "o", "x")
    with pytest.raises(ValueError, match="wording: expected first or all, got 'random'"):
        export([], tmp_path / "o", "messages", wording="random")
    marked = FoodRecord("a", "/a.jpg", "s", category="a <image> of soup")
    done = export([marked], tmp_path / "o", "messages")
    assert done.left_out == {"<image> in a text": 1, "no question": 1}


@pytest.mark.data
def test_real_photographs(rode_data: Path, tmp_path: Path) -> None:
    convert("food-photos", rode_data / "food_photos", tmp_path / "r.jsonl", on_bad_image="skip")
    records = list(read_records(tmp_path / "r.jsonl"))
    for to in FORMATS:
        done = export(records, tmp_path / "out" / "o.json", to)
        assert done.questions == sum(asked(records).values()) > 400
        again = convert(to, tmp_path / "out" / "o.json", tmp_path / "out" / f"{to}.jsonl")
        assert sum(again.written.values()) == done.entries
        assert (again.left_out, again.noted) == ({}, {})
        found = Counter()
        for (images, *rest), count in asked(read_records(tmp_path / "out" / f"{to}.jsonl")).items():
            found[tuple(str(Path(i).resolve()) for i in images), *rest] += count
        assert found == asked(records)
