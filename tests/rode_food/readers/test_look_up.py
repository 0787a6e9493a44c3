"""Pictures whose names are composed (NFC) in the data and decomposed (NFD) on disk, or the other way round, are found."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from published_layouts import (
    layer1,
    layer2,
    write_food101,
    write_lines,
    write_nutrition5k,
    write_picture,
    write_recipes,
    write_vireo,
)
from rode_food.images import ImageError, decode_picture, open_image, picture_size
from rode_food.look_up import look_up
from rode_food.readers import read_source
from rode_food.readers.log import ReadLog

FORMS = ["NFC", "NFD"]
NAME = "crème_ごま_가지.jpg"  # all three have two forms


def form(text: str, name: str) -> str:
    return unicodedata.normalize(name, text)


def recipe1m(folder: Path, named: str, stored: str) -> None:
    # four letters of the name are its folders: one of them has two forms
    letters = unicodedata.normalize("NFC", stored)[:4]
    write_recipes(folder, [layer1("00aa")], [layer2("00aa", named)], [])
    write_picture(folder / "images" / Path(*letters) / stored)


def food_101(folder: Path, named: str, stored: str) -> None:
    write_food101(folder, [], [])
    write_lines(folder / "meta" / "classes.txt", ["pie"])
    write_lines(folder / "meta" / "train.txt", [f"pie/{named.removesuffix('.jpg')}"])
    write_picture(folder / "images" / "pie" / stored)


def vireo(folder: Path, named: str, stored: str) -> None:
    write_vireo(folder, ["Pork"], ["Scallion"], {f"/1/{named}": [1]}, TR=[f"/1/{named}"], VAL=[], TE=[])
    (folder / "ready_chinese_food" / "1" / named).unlink()  # it wrote the picture by that name
    write_picture(folder / "ready_chinese_food" / "1" / stored)


def dishes_jsonl(folder: Path, named: str, stored: str) -> None:
    numbers = {"mass_g": 1, "kcal": 1, "fat_g": 0, "protein_g": 0, "carb_g": 0}
    dish = {"dish_id": named.removesuffix(".jpg"), "ingredients": [], **numbers}
    write_lines(folder / "dishes.jsonl", [json.dumps(dish)])
    write_picture(folder / "sample_images" / stored)


def nutrition5k(folder: Path, named: str, stored: str) -> None:
    row = [named, 100, 50, 1, 1, 1, "ingr_0000000001", "rice", 50, 50, 1, 1, 1]
    write_nutrition5k(folder, [row], [], train=[named], test=[], pictures=[stored])


def photographs(folder: Path, named: str, stored: str) -> None:
    entry = {"id": "a", "title": "A", "image": f"images/{named}", "ingredients": ["salt"], "instructions": []}
    write_lines(folder / "photos.json", [json.dumps([entry])])
    write_picture(folder / "images" / stored)


def dialogues(folder: Path, named: str, stored: str) -> None:
    said = [{"form": "question", "value": "<image>\nHow?"}, {"form": "answer", "value": "Boil."}]
    file = folder / "Recipe1M" / "recipe1m_train_1488.json"
    write_lines(file, [json.dumps([{"image": named, "conversations": said}])])
    letters = unicodedata.normalize("NFC", stored)[:4]
    write_picture(folder / "Recipe1M" / "images" / "train" / Path(*letters) / stored)


LAYOUTS: dict[str, Callable[[Path, str, str], None]] = {
    "recipe1m": recipe1m,
    "food-101": food_101,
    "vireofood-172": vireo,
    "nutrition5k": nutrition5k,
    "nutrition5k-jsonl": dishes_jsonl,
    "food-photos": photographs,
    "food-dialogues": dialogues,
}


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("named", FORMS)
def test_every_reader_finds_both_forms(tmp_path: Path, kind: str, stored: str, named: str) -> None:
    LAYOUTS[kind](tmp_path, form(NAME, named), form(NAME, stored))
    log = ReadLog(strict=True)
    (record,) = read_source(kind, tmp_path, log)
    assert not log.counts
    # the name on disk, whatever the data says, and nothing is renamed
    assert form(NAME, stored) in record.image
    assert Path(record.image).is_file()
    assert open_image(record.image).size == (16, 16)


@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("named", FORMS)
def test_files_of_records_and_conversations(tmp_path: Path, stored: str, named: str) -> None:
    picture = write_picture(tmp_path / form("naïve", stored) / form(NAME, stored))
    path = f"{form('naïve', named)}/{form(NAME, named)}"
    write_lines(tmp_path / "r.jsonl", [json.dumps({"id": "a", "source": "s", "image": path})])
    (record,) = read_source("records", tmp_path / "r.jsonl", ReadLog(strict=True))
    assert record.image == str(picture)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Rice."}]
    write_lines(tmp_path / "c.json", [json.dumps([{"id": "a", "image": path, "conversations": turns}])])
    (record,) = read_source("llava-instruct", tmp_path / "c.json", ReadLog(strict=True))
    assert record.image == str(picture)
    # training opens what a file of records names, without a reader
    named_path = tmp_path / path
    assert (
        open_image(named_path).size == decode_picture(named_path).size == picture_size(named_path) == (16, 16)
    )


def test_look_up(tmp_path: Path) -> None:
    plain = write_picture(tmp_path / "plain.jpg")
    assert look_up(plain) == plain
    missing = tmp_path / "crème.jpg"
    assert look_up(missing) == missing
    assert look_up(tmp_path / "gone" / "crème.jpg") == tmp_path / "gone" / "crème.jpg"
    # neither all composed nor all decomposed
    mixed = write_picture(tmp_path / "cre\u0300me bru\u0302l\u00e9e.jpg")
    assert look_up(tmp_path / form(mixed.name, "NFC")) == look_up(tmp_path / form(mixed.name, "NFD")) == mixed
    # a file that came later is found
    later = write_picture(tmp_path / form("crème.jpg", "NFD"))
    assert look_up(missing).name in (later.name, missing.name)
    assert look_up(missing).is_file()
    with pytest.raises(ImageError, match=r"purée\.jpg is missing"):
        decode_picture(tmp_path / "purée.jpg")
