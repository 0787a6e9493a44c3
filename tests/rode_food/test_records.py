from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.records import (
    FoodRecord,
    Ingredient,
    Nutrition,
    Quantity,
    RecordError,
    Turn,
    read_records,
    record_as_written,
    record_from_json,
    record_to_json,
    with_folder,
    with_images,
    write_records,
)
from rode_food.tasks import make_examples

MINIMAL = {"id": "a", "image": "a.jpg", "source": "s"}
DOCS = Path(__file__).parents[2] / "docs" / "records.md"


def write_lines(path: Path, *objects: object) -> Path:
    path.write_text(
        "".join(o if isinstance(o, str) else json.dumps(o) + "\n" for o in objects), encoding="utf-8"
    )
    return path


def error_of(path: Path, **kwargs: str) -> str:
    with pytest.raises(RecordError) as caught:
        list(read_records(path, **kwargs))
    assert "\n" not in str(caught.value)
    return str(caught.value)


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: text.strip())
numbers = st.floats(0, 1e9, allow_nan=False, allow_infinity=False)
maybe = st.one_of(st.none(), numbers)
nutrition = st.builds(
    Nutrition,
    maybe,
    maybe,
    maybe,
    maybe,
    maybe,
    micronutrients=st.dictionaries(texts, st.builds(Quantity, numbers, texts), max_size=3),
)
ingredient = st.builds(Ingredient, texts, maybe, st.none() | texts, maybe, st.none() | nutrition)
record = st.builds(
    FoodRecord,
    id=texts,
    image=texts,
    source=texts.filter(lambda text: text != "all"),
    title=st.none() | texts,
    category=st.none() | texts,
    ingredients=st.lists(ingredient, max_size=3).map(tuple),
    instructions=st.lists(texts, max_size=3).map(tuple),
    nutrition=st.none() | nutrition,
    split=st.sampled_from([None, "train", "val", "test"]),
    more_images=st.lists(texts, max_size=2).map(tuple),
    conversation=st.lists(st.builds(Turn, texts, texts), max_size=3).map(tuple),
)
record = record | record.map(lambda one: with_images(one, ()))


@settings(max_examples=100, deadline=None)
@given(record)
def test_a_record_survives_json(one: FoodRecord) -> None:
    assert record_from_json(json.loads(json.dumps(record_to_json(one)))) == one


def test_a_file_survives_reading_and_writing(tmp_path: Path) -> None:
    inside = str(tmp_path / "images" / "a.jpg")
    records = [
        FoodRecord("a", inside, "s", ingredients=(Ingredient("egg", 2.0, mass=100.5),), split="train"),
        FoodRecord("b", "/elsewhere/b.jpg", "s", nutrition=Nutrition(energy=0.0), split="test"),
    ]
    path = tmp_path / "r.jsonl"
    assert write_records(path, records) == 2
    assert list(read_records(path)) == records
    assert [r.id for r in read_records(path, split="test")] == ["b"]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    # movable with its folder; unknown fields left out, a known zero kept
    assert lines[0]["image"] == "images/a.jpg"
    assert lines[1] == {
        "id": "b",
        "image": "/elsewhere/b.jpg",
        "source": "s",
        "nutrition": {"energy": 0},
        "split": "test",
    }


def test_several_pictures_and_none(tmp_path: Path) -> None:
    turns = (Turn("What is it?", "A soup."), Turn("Is it hot?", "Yes."))
    records = [
        FoodRecord("a", str(tmp_path / "1.jpg"), "s", more_images=("/far/2.jpg", str(tmp_path / "3.jpg"))),
        FoodRecord("b", "", "s", conversation=turns),
    ]
    path = tmp_path / "r.jsonl"
    write_records(path, records)
    assert list(read_records(path)) == records
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[0] == {"id": "a", "image": ["1.jpg", "/far/2.jpg", "3.jpg"], "source": "s"}
    assert lines[1] == {
        "id": "b",
        "source": "s",
        "conversation": [
            {"question": "What is it?", "answer": "A soup."},
            {"question": "Is it hot?", "answer": "Yes."},
        ],
    }
    assert [record.images for record in read_records(path)] == [
        (f"{tmp_path}/1.jpg", "/far/2.jpg", f"{tmp_path}/3.jpg"),
        (),
    ]
    for empty in (None, []):
        assert record_from_json({**MINIMAL, "image": empty}).images == ()
    with pytest.raises(ValueError, match="record 'a': more_images without an image"):
        FoodRecord("a", "", "s", more_images=("b.jpg",))


def test_who_is_reading_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [FoodRecord("a", "a.jpg", "s")])
    with path.open() as reader:
        write_records(path, [FoodRecord("b", "b.jpg", "s")])
        assert json.loads(reader.read())["id"] == "a"
    assert [record.id for record in read_records(path)] == ["b"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write_records(path, [FoodRecord("a", "a.jpg", "s")])
    before = path.read_bytes()
    with pytest.raises(RecordError, match=r"record 'b': nutrition\.fat: expected a finite number >= 0"):
        write_records(
            path,
            [FoodRecord("a", "a.jpg", "s"), FoodRecord("b", "b.jpg", "s", nutrition=Nutrition(fat=-1.0))],
        )
    with pytest.raises(RecordError, match="record 'a': id: stands twice"):
        write_records(path, [FoodRecord("a", "a.jpg", "s")] * 2)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ingredients": [{"name": "a"}, {"name": "b", "amount": "two"}]},
         'ingredients[1].amount: expected a number, got "two"'),
        ({"ingredients": [{"amount": 1}]}, "ingredients[0].name: missing; expected a non-empty string"),
        ({"ingredients": "egg"}, 'ingredients: expected a list, got "egg"'),
        ({"nutrition": {"protien": 3}}, "nutrition.protien: unknown field; did you mean 'protein'?"),
        ({"nutrition": {"carbohydrate": 3}}, "nutrition.carbohydrate: unknown field; did you mean 'carb'?"),
        ({"nutrition": {"mass": True}}, "nutrition.mass: expected a number, got true"),
        ({"nutrition": {"mass": 10**400}}, "nutrition.mass: expected a finite number >= 0, got"),
        ({"nutrition": {"energy": -3}}, "nutrition.energy: expected a finite number >= 0, got -3"),
        ({"nutrition": {"micronutrients": {"iron": {"value": 1}}}},
         "nutrition.micronutrients.iron.unit: missing; expected a non-empty string"),
        ({"nutrition": {"micronutrients": {"iron": 3}}}, "nutrition.micronutrients.iron: expected an object, got 3"),
        ({"nutrition": {"micronutrients": []}}, "nutrition.micronutrients: expected an object, got []"),
        ({"titel": "x"}, "titel: unknown field; did you mean 'title'?"),
        ({"xyzzy": 1}, "xyzzy: unknown field; known fields: id, image, source, title, category"),
        ({"split": "dev"}, 'split: expected one of train, val, test or null, got "dev"'),
        ({"split": ["train"]}, 'split: expected one of train, val, test or null, got ["train"]'),
        ({"id": ""}, 'id: expected a non-empty string, got ""'),
        ({"image": ""}, 'image: expected a non-empty string, got ""'),
        ({"image": ["a.jpg", " "]}, 'image[1]: expected a non-empty string, got " "'),
        ({"image": {"path": "a.jpg"}}, 'image: expected a non-empty string, got {"path": "a.jpg"}'),
        ({"more_images": ["b.jpg"]}, "more_images: unknown field"),
        ({"conversation": [{"question": "Why?"}]}, "conversation[0].answer: missing; expected a non-empty string"),
        ({"conversation": [{"question": "Why?", "answer": " "}]},
         'conversation[0].answer: expected a non-empty string, got " "'),
        ({"conversation": [{"question": "Why?", "answer": "So.", "role": "x"}]},
         "conversation[0].role: unknown field; known fields: question, answer"),
        ({"instructions": ["a", ""]}, 'instructions[1]: expected a non-empty string, got ""'),
        ({"source": "all"}, 'source: "all" stands for all sources'),
        ({"title": "x" * 500 + "\n", "split": "x" * 500}, 'split: expected one of train, val, test or null, got "xxx'),
    ],
)  # fmt: skip
def test_an_error_names_line_field_and_value(tmp_path: Path, change: dict, message: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", {**MINIMAL, "id": "ok"}, "\n", {**MINIMAL, **change})
    text = error_of(path)
    assert text.startswith(f"{path}:3: {message}")
    assert len(text) < 250 + len(str(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": \n', "not JSON: Expecting value"),
        ("[]\n", "record: expected an object, got []"),
        (
            '{"id": "b", "image": "b", "source": "s", "nutrition": {"mass": NaN}}\n',
            "NaN is not a JSON number",
        ),
    ],
)
def test_what_is_no_json_object(tmp_path: Path, line: str, message: str) -> None:
    path = write_lines(tmp_path / "r.jsonl", MINIMAL, line)
    assert error_of(path).startswith(f"{path}:2: {message}")


def test_duplicates_missing_splits_and_bad_bytes(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", MINIMAL, {**MINIMAL, "id": "b"}, MINIMAL)
    assert error_of(path) == f"{path}:3: id: 'a' stands on line 1 already"
    assert error_of(path, split="train") == f"{path}:1: split: missing, but split 'train' was asked for"
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        list(read_records(path, split="dev"))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(MINIMAL).encode() + b"\n\xff\n")
    assert error_of(path).startswith(f"{path}:2: not UTF-8")


def test_reading_is_streaming(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "r.jsonl", MINIMAL, "broken\n")
    assert next(read_records(path)).id == "a"


def test_the_documented_example_is_a_record() -> None:
    example = re.search(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert example is not None
    record = record_from_json(json.loads(example[1]))
    assert record.nutrition is not None
    assert record.nutrition.complete
    # what the page says of the parts adds up to what it says of the dish
    parts = [i.nutrition for i in record.ingredients if i.nutrition]
    for name in ("mass", "energy", "fat", "protein", "carb"):
        assert sum(getattr(p, name) for p in parts) == pytest.approx(getattr(record.nutrition, name))
    # and the answers that it shows are the ones that the record gives
    examples = make_examples(replace(record, image="/a.jpg"), ["ingredients", "nutrition", "category"])
    assert len(examples) == 3
    for example in examples:
        assert f"`{example.answer}`" in DOCS.read_text(encoding="utf-8")


def test_every_field_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for cls in (FoodRecord, Ingredient, Nutrition, Quantity, Turn):
        for field in fields(cls):
            mark = f'"{field.name}"' if cls is Quantity else f"`{field.name}`"
            assert mark in text, f"{cls.__name__}.{field.name} is not in {DOCS.name}"


def test_the_documented_python_runs(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (tmp_path / "predictions.jsonl").write_text(
        json.dumps(
            {
                "id": "a",
                "source": "s",
                "task": "category",
                "answer": "A soup.",
                "truth": "soup",
                "reference": "soup",
            }
        )
    )
    # in a process where `rode` is but a path: its __init__ registers the tuner and so imports torch, which
    # records and metrics must do without
    alone = """
import importlib.util, sys, types
path = importlib.util.find_spec("rode").submodule_search_locations
sys.modules["rode"] = types.ModuleType("rode")
sys.modules["rode"].__path__ = list(path)
"""
    script = "\n".join([alone, *code, "assert 'torch' not in sys.modules"])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"dish_0001 {tmp_path.resolve()}/images/dish_0001.jpg"
    assert "'category_accuracy': 100.0" in done.stdout


@given(record)
def test_a_record_just_written_needs_no_second_check(given_record: FoodRecord) -> None:
    obj = json.loads(json.dumps(record_to_json(given_record)))
    found = record_as_written(obj)
    assert found == record_from_json(obj)
    assert repr(found) == repr(record_from_json(obj))  # floats are floats


@pytest.mark.parametrize(
    "obj",
    [
        {"id": "a", "image": "b"},
        {"id": "a", "image": "b", "source": "c", "sauce": "d"},
        {"id": "a", "image": "b", "source": "c", "nutrition": {"mass": "two"}},
        {"id": "a", "image": "b", "source": "c", "nutrition": {"protien": 2}},
        {"id": "a", "image": "b", "source": "c", "nutrition": 3},
        {"id": "a", "image": "b", "source": "c", "ingredients": [{"nom": "rice"}]},
        {"id": "a", "image": "b", "source": "c", "nutrition": {"micronutrients": {"iron": {"value": 1}}}},
    ],
)
def test_what_was_never_written_is_refused_all_the_same(obj: dict) -> None:
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError)):
        record_as_written(obj)


def test_texts_of_a_conversation_are_text_whatever_they_hold():
    turn = {"question": "What does <image> mean in </s> HTML?", "answer": "<|im_end|>"}
    record = record_from_json({"id": "a", "source": "s", "conversation": [turn]})
    assert record.conversation == (Turn(**turn),)


@given(st.text("a./~\\ ", min_size=1, max_size=9), st.sampled_from(["/food", "/", "/a b/c"]))
def test_paths_of_pictures_are_pathlibs(image, folder):
    record = FoodRecord("1", image, "s")
    assert with_folder(record, Path(folder)).image == str(Path(folder) / image)
