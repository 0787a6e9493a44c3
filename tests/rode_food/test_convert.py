from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from rode.cli import main
from rode_food.convert import convert
from rode_food.images import ImageError, check_image
from rode_food.lines import apply, library
from rode_food.records import FoodRecord, Ingredient, Nutrition, RecordError, read_records
from rode_food.tasks import make_examples, parse_answer
from tagger import need_tagger


def picture(path: Path, size: int = 64) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((size, size), 60).convert("RGB").save(path)
    return path


def recipe(name: str, **changes: object) -> dict:
    return {
        "id": f"pdr_{name}",
        "title": name.title(),
        "image": f"images/{name}.jpg",
        "category": "soup",
        "ingredients": ["300g (2/3 lb) leeks", "1 onion, diced", "For the top", "Salt"],
        "amounts": None,
        "instructions": ["Boil the [stock](/stock).", "**Serve** hot."],
        "kcal_estimate": 500.0,
        **changes,
    }


def photos(folder: Path, *entries: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "photos.json").write_text(json.dumps(list(entries)), encoding="utf-8")
    for entry in entries:
        picture(folder / entry["image"])
    return folder


@pytest.mark.usefixtures("tagger")
def test_food_photos(tmp_path: Path) -> None:
    listed = recipe(
        "shrimp",
        id="htc_shrimp",
        ingredients=["Shrimp", "Scallion, Ginger", "Garlic (fresh, peeled)", "Clay Pot (or an iron pot)"],
        amounts=["Shrimp 250g", "Ginger: 2 slices", "Water 1L"],
    )
    source = photos(tmp_path / "in", recipe("leek"), listed)
    done = convert("food-photos", source, tmp_path / "out.jsonl", fractions={"train": 1.0})
    assert (done.written, done.left_out) == ({"train": 2}, {})
    assert str(done) == (
        "wrote 2 records (2 train); noted 1 x a line that names no ingredient, 1 x a tool among the ingredients"
    )
    leek, shrimp = read_records(tmp_path / "out.jsonl")
    assert leek == FoodRecord(
        id="pdr_leek",
        image=str(tmp_path / "in" / "images" / "leek.jpg"),
        source="in",
        title="Leek",
        category="soup",
        ingredients=(
            Ingredient("leeks", 300.0, "g", 300.0, text="300g (2/3 lb) leeks"),
            Ingredient("onion", 1.0, text="1 onion, diced"),
            Ingredient("salt", text="Salt"),
        ),
        instructions=("Boil the stock.", "Serve hot."),
        nutrition=None,  # the estimate's basis is unknown
        split="train",
    )
    assert shrimp.source == "in"
    assert shrimp.ingredients == (
        Ingredient("shrimp", 250.0, "g", 250.0, text="Shrimp 250g"),  # the line that says more
        Ingredient("scallion", text="Scallion"),
        Ingredient("ginger", 2.0, "slice", text="Ginger: 2 slices"),
        Ingredient("garlic", text="Garlic (fresh, peeled)"),
    )
    # pictures below the file's folder are named relative to it
    assert json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])["image"] == "in/images/leek.jpg"


@pytest.mark.usefixtures("tagger")
def test_food_photos_sources_repeats_and_edible_papers(tmp_path: Path) -> None:
    lines = ["100 g sugar", "12 rice papers", "50 g sugar", "Baking paper", "1 cup milk", "1/4 kg sugar"]
    lines += ["2 tbsp milk", "salt", "1 tsp salt"]
    source = photos(tmp_path / "in", recipe("a", ingredients=lines, source="mine"))
    done = convert("food-photos", source, tmp_path / "out.jsonl")
    assert done.noted == {"a tool among the ingredients": 1}
    (record,) = read_records(tmp_path / "out.jsonl")
    assert record.source == "mine"
    assert [(i.name, i.amount, i.unit, i.mass) for i in record.ingredients] == [
        ("sugar", 400.0, "g", 400.0),
        ("rice papers", 12.0, None, None),
        ("milk", 1.125, "cup", None),
        ("salt", 1.0, "tsp", None),
    ]
    (source / "photos.json").write_text(json.dumps([recipe("a", source=3)]))
    with pytest.raises(RecordError, match="source that is no text: 3"):
        convert("food-photos", source, tmp_path / "out.jsonl", strict=True)


def test_lines_are_read_by_the_library_or_by_the_simple_parser(tmp_path: Path, monkeypatch) -> None:
    need_tagger()
    source = photos(
        tmp_path / "in", recipe("a", ingredients=["1 x 400g tin tomatoes", "14 cup water", "For the sauce:"])
    )
    out = tmp_path / "out.jsonl"
    expected = {"a lost slash": 1, "a line that names no ingredient": 1}
    assert convert("food-photos", source, out).noted == expected
    (record,) = read_records(out)
    assert [(i.name, i.amount, i.mass) for i in record.ingredients] == [
        ("tomatoes", 1, 400),
        ("water", 0.25, None),
    ]
    assert convert("food-photos", source, tmp_path / "two.jsonl", workers=2).noted == expected
    assert (tmp_path / "two.jsonl").read_bytes() == out.read_bytes()
    convert("food-photos", source, out, lines="simple")
    (record,) = read_records(out)
    assert [i.name for i in record.ingredients] == ["x 400g tin tomatoes", "water"]
    with pytest.raises(ValueError, match="lines: expected one of library, simple, got 'x'"):
        convert("food-photos", source, out, lines="x")
    monkeypatch.setitem(sys.modules, "ingredient_parser", None)
    library.parser.cache_clear()
    apply.why_simple.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=r"read by a simple parser, worse: .* pip install 'rode\[data\]'"
        ):
            done = convert("food-photos", source, out)
        assert "1 x the library of ingredient lines is missing: a simple parser read them" in str(done)
    finally:
        library.parser.cache_clear()
        apply.why_simple.cache_clear()


def test_names_and_amounts_that_a_source_states_itself_are_kept(tmp_path: Path) -> None:
    need_tagger()
    kept = [
        {"name": "wheat", "amount": 3, "unit": "cup", "mass": 7.5, "text": "1 1/2 cups (180 g) plain flour"},
        {"name": "plain flour", "text": "1 1/2 cups plain flour"},
    ]
    picture(tmp_path / "a.jpg")
    row = {
        "id": "a",
        "image": "a.jpg",
        "source": "s",
        "ingredients": kept,
        "instructions": ["Mix."],
        "split": "train",
    }
    (tmp_path / "in.jsonl").write_text(json.dumps(row) + "\n")
    convert("records", tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["ingredients"] == kept


def test_a_conversion_that_wrote_nothing_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = photos(tmp_path / "in", recipe("a", ingredients=[], instructions=[]))
    assert main(["data", "convert", "food-photos", str(source), str(tmp_path / "o.jsonl")]) == 1
    assert "wrote 0 records (none); left out 1 with neither" in capsys.readouterr().out


@pytest.mark.usefixtures("tagger")
def test_nutrition5k(tmp_path: Path) -> None:
    def dish(name: str, mass: float) -> dict:
        values = {"kcal": 122.5, "mass_g": mass, "fat_g": 7.5, "carb_g": 0.0, "protein_g": 12.5}
        return {
            "dish_id": name,
            "cafe": "c",
            **values,
            "ingredients": [{"id": "i", "name": "beef", **values}],
        }

    picture(tmp_path / "sample_images" / "d1.jpg")
    picture(tmp_path / "sample_images" / "d2.jpg")
    lines = [dish("d1", 49.0), dish("d2", 0.0), dish("d3", 49.0)]
    (tmp_path / "dishes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = convert("nutrition5k-jsonl", tmp_path, tmp_path / "out.jsonl", fractions={"test": 1.0})
    assert str(done) == "wrote 1 records (1 test); left out 1 with no mass, 1 with no picture"
    (record,) = read_records(tmp_path / "out.jsonl")
    nutrition = Nutrition(mass=49.0, energy=122.5, fat=7.5, protein=12.5, carb=0.0)
    assert record.nutrition == nutrition
    assert record.ingredients == (Ingredient("beef", 49.0, "g", 49.0, nutrition),)
    (tmp_path / "dishes.jsonl").write_text(json.dumps(lines[0] | {"kcal": None}) + "\n")
    with pytest.raises(RecordError, match=r"dishes\.jsonl:1: kcal that is no number: None"):
        convert("nutrition5k-jsonl", tmp_path, tmp_path / "out.jsonl", strict=True)
    (tmp_path / "dishes.jsonl").write_text('{"dish_id": "d1", "ingredients": []}\n[]\n{}}\n')
    with pytest.raises(RecordError, match=r"dishes\.jsonl:1: a field that is missing: mass_g"):
        convert("nutrition5k-jsonl", tmp_path, tmp_path / "out.jsonl", strict=True)
    done = convert("nutrition5k-jsonl", tmp_path, tmp_path / "out.jsonl")
    assert done.left_out == {"a field that is missing": 1, "a line that is no dish": 1, "invalid JSON": 1}


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"" if how == "empty" else b"<html>not found</html>")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "is missing"),
        ("cut short", "cannot be decoded"),
        ("empty", "is not a picture that Pillow knows"),
        ("text", "is not a picture that Pillow knows"),
    ],
)
def test_a_bad_image_names_its_record(tmp_path: Path, how: str, message: str) -> None:
    source = photos(tmp_path / "in", recipe("good"), recipe("bad"))
    damage(source / "images" / "bad.jpg", how)
    out = tmp_path / "out.jsonl"
    with pytest.raises(ImageError, match=rf"record 'pdr_bad': image .*bad\.jpg {message}"):
        convert("food-photos", source, out)
    assert not out.exists()
    done = convert("food-photos", source, out, on_bad_image="skip")
    assert (sum(done.written.values()), done.left_out) == (1, {"a missing or corrupt image": 1})
    assert [record.id for record in read_records(out)] == ["pdr_good"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kind: expected one of recipe1m-plus, .*, records, got 'x'"):
        convert("x", tmp_path, tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"source: .*absent is not a folder"):
        convert("food-photos", tmp_path / "absent", tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="on_bad_image: expected error or skip, got 'ignore'"):
        convert("food-photos", tmp_path, tmp_path / "out.jsonl", on_bad_image="ignore")
    source = photos(tmp_path / "in", recipe("a"))
    (source / "photos.json").write_text(json.dumps([recipe("a", title=None)]))
    with pytest.raises(RecordError, match=r"photos\.json:1: no title: expected a str, got None"):
        convert("food-photos", source, tmp_path / "out.jsonl", strict=True)
    with pytest.raises(ValueError, match="foodlmm: kind food-photos does not take it; it takes no options"):
        convert("food-photos", source, tmp_path / "out.jsonl", foodlmm=True)
    with pytest.raises(ValueError, match="images_per_recipe: expected a whole number of at least 1, got 0"):
        convert("recipe1m", source, tmp_path / "out.jsonl", images_per_recipe=0)
    with pytest.raises(ValueError, match=r"source: .*in is not a file"):
        convert("records", source, tmp_path / "out.jsonl")


@pytest.mark.data
def test_real_photographs(rode_data: Path, tmp_path: Path) -> None:
    done = convert("food-photos", rode_data / "food_photos", tmp_path / "photos.jsonl")
    assert sum(done.written.values()) == 201
    assert set(done.written) == {"train", "val", "test"}
    records = {record.id: record for record in read_records(tmp_path / "photos.jsonl")}
    assert [i.name for i in records["pdr_aelplermagronen"].ingredients] == [
        "bacon cubes",
        "onions",
        "potatoes",
        "milk",
        "macaroni",
        "soft cheese",
        "apple sauce",
    ]
    names = Counter(i.name for record in records.values() for i in record.ingredients)
    assert {name for name, _ in names.most_common(5)} >= {"salt", "garlic", "light soy sauce"}
    # a name is a name: next to none is a sentence, or holds an amount
    assert sum(len(name.split()) > 4 for name in names) < 0.03 * len(names)
    assert sum(any(c.isdigit() for c in name) for name in names) < 0.03 * len(names)
    assert sum(i.amount is not None for r in records.values() for i in r.ingredients) > 1000
    for record in records.values():
        check_image(record)
        tasks = {example.task for example in make_examples(record)}
        assert tasks == {"ingredients", "recipe", "category"}
        for example in make_examples(record):
            assert parse_answer(example.task, example.answer) == example.reference


@pytest.mark.data
def test_real_weighed_plates(rode_data: Path, tmp_path: Path) -> None:
    done = convert("nutrition5k-jsonl", rode_data / "nutrition5k", tmp_path / "n5k.jsonl")
    records = list(read_records(tmp_path / "n5k.jsonl"))
    assert len(records) == sum(done.written.values()) == 4
    assert sum(done.left_out.values()) + len(records) == 5006
    for record in records:
        assert record.nutrition is not None
        for name in ("mass", "energy", "fat", "protein", "carb"):
            parts = sum(getattr(i.nutrition, name) for i in record.ingredients if i.nutrition)
            assert parts == pytest.approx(getattr(record.nutrition, name), rel=0.02, abs=0.1)
        (example,) = make_examples(record, ["nutrition"])
        parsed = parse_answer("nutrition", example.answer)
        assert parsed == pytest.approx(example.reference, rel=0.05, abs=0.05)


def test_data_without_ingredient_lines_need_no_library(tmp_path, monkeypatch):
    """Its import takes seconds, and it may ask the network for a tagger."""
    asked = []
    monkeypatch.setattr("rode_food.lines.apply.why_simple", lambda: asked.append(1))
    monkeypatch.setattr("rode_food.convert.why_simple", lambda: asked.append(1))
    said = [{"from": "human", "value": "What is salt?"}, {"from": "gpt", "value": "NaCl."}]
    (tmp_path / "a.json").write_text(json.dumps([{"id": "a", "conversations": said}]))
    done = convert("llava-instruct", tmp_path / "a.json", tmp_path / "records.jsonl", workers=1)
    assert done.noted == {}
    assert not asked
