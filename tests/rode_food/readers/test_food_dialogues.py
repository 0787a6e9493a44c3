from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rode_food.readers import guess_kind, read_source
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient, RecordError, Turn


def picture(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(path)
    return str(path)


def write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def said(*texts: str) -> list[dict]:
    return [{"form": ("question", "answer")[i % 2], "value": text} for i, text in enumerate(texts)]


def read(folder: Path, **options: bool) -> tuple[list[FoodRecord], ReadLog]:
    log = ReadLog(**options)
    return list(read_source("food-dialogues", folder, log)), log


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dishes = tmp_path / "Nutrition5k"
    told = "It weighs 193.0 grams [TOTAL_MASS], of which 12 g [FAT] is fat.</s>rest"
    entries = [
        {"dish_id": "dish_1", "conversations": said("<image>\nHow {heavy} is it?", told, "Why?", "So.")},
        {"dish_id": "dish_1", "conversations": said("And now?", "The same.")},
        {"dish_id": "dish_2", "conversations": said("<image>\nWhat is it?", "Rice.")},
        {"dish_id": "dish_3", "conversations": said("<image>\nWhat is it?", "Rice.")},
        {"dish_id": "../dish", "conversations": said("<image>\nWhat is it?", "Rice.")},
        {"dish_id": "dish_2", "conversations": [{"form": "question"}]},
    ]
    write(dishes / "FoodDialogues_train.json", entries)
    write(dishes / "FoodDialogues_test.json", [{"dish_id": "dish_2", "conversations": said("Hot?", "Yes.")}])
    picture(dishes / "images" / "dish_1" / "camera_A.jpg")
    picture(dishes / "images" / "dish_1" / "rgb.png")
    picture(dishes / "images" / "dish_2" / "frame.jpg")
    recipes = tmp_path / "Recipe1M"
    write(
        recipes / "recipe1m_train_1488.json",
        [{"image": "abcdef.jpg", "conversations": said("<image>\nHow?", "Boil.")}],
    )
    picture(recipes / "images" / "train" / "a" / "b" / "c" / "d" / "abcdef.jpg")
    vireo = tmp_path / "VireoFood172"
    write(vireo / "train_id.json", ["/1/1_0.jpg", "/2/2_0.jpg", "/9/9_0.jpg"])
    write(vireo / "foodlist.json", ["Braised Pork", "Fried Rice"])
    write(vireo / "ingre.json", ["/1/1_0.jpg Pork, Scallion, pork"])
    picture(vireo / "ready_chinese_food" / "1" / "1_0.jpg")
    return tmp_path


def test_conversations_of_three_sources(folder: Path) -> None:
    assert guess_kind(folder) == "food-dialogues"
    records, log = read(folder)
    assert [(r.id, r.source, r.split) for r in records] == [
        ("dish_2", "food-dialogues", "test"),
        ("dish_1", "food-dialogues", "train"),
        ("dish_1_2", "food-dialogues", "train"),
        ("dish_2_2", "food-dialogues", "train"),
        ("abcdef", "recipe1m-dialogues", "train"),
        ("vireofood172-1/1_0", "vireofood-172", "train"),
    ]
    assert records[1].conversation == (
        Turn("How heavy is it?", "It weighs 193.0 grams, of which 12 g is fat."),
        Turn("Why?", "So."),
    )
    assert records[1].image.endswith("dish_1/rgb.png")
    assert records[0].image.endswith("dish_2/frame.jpg")
    assert records[5].category == "Braised Pork"
    assert records[5].ingredients == (Ingredient("pork"), Ingredient("scallion"))
    assert log.counts == {
        "no picture on disk": 2,
        "a picture outside its folder": 1,
        "a message that is no text": 1,
        "an unknown class": 1,
    }


def test_any_part_will_do_and_none_is_an_error(folder: Path, tmp_path: Path) -> None:
    assert len(read(folder / "Recipe1M")[0]) == 1
    assert len(read(folder / "VireoFood172")[0]) == 1
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match=r"expected FoodDialogues_\*\.json or .* found none"):
        read(tmp_path / "empty")
    write(folder / "VireoFood172" / "foodlist.json", {"1": "a"})
    with pytest.raises(RecordError, match=r"foodlist\.json: expected a list of texts"):
        read(folder / "VireoFood172")
