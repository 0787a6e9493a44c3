"""FoodLMM's conversations about pictures (Yin et al., 2023): FoodDialogues, Recipe1M, VireoFood-172.

Laid out below one folder as github.com/YuehaoYin/FoodLMM describes and as its loaders read it:

    Nutrition5k/FoodDialogues_train.json, FoodDialogues_test.json   [{dish_id, conversations: [{form, value}]}]
    Nutrition5k/images/DISH/rgb.png                                 or frames of the side cameras
    Recipe1M/recipe1m_train_1488.json                               [{image, conversations: [{form, value}]}]
    Recipe1M/images/train/a/b/c/d/abcd....jpg
    VireoFood172/train_id.json                                      ["/CLASS/PICTURE.jpg", ...]
    VireoFood172/foodlist.json, ingre.json                          [name of class 1, ...], ["/CLASS/PICTURE.jpg rice, egg", ...]
    VireoFood172/ready_chinese_food/CLASS/PICTURE.jpg

`form` is question or answer. Answers have marks behind their numbers ("193 g [TOTAL_MASS]"), which FoodLMM's heads predict, and
questions have braces; neither is kept. No copy of the files was at hand: the fields are those that the published loaders read.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.look_up import look_up
from rode_food.readers.common import Broken, safe_name, safe_path, shown
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.readers.turns import Said, role_of, turns_of
from rode_food.records import FoodRecord, Ingredient, RecordError

_FORMS = {"question": "user", "answer": "assistant"}
_MARK = re.compile(r"\s*\[(?:TOTAL_)?(?:MASS|CAL|FAT|CARB|PRO)(?:_TOTAL)?\d*\]")
_PATTERNS = ("FoodDialogues_*.json", "recipe1m_*.json")
_SUFFIXES = (".png", ".jpg", ".jpeg")


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """One record a conversation, with the split that its file's name has; one a picture of VireoFood-172, with category and
    ingredients.

    Raises:
        RecordError: none of the files is there; a broken entry, if `log.strict`.
    """
    folders = [source, *(source / name for name in ("Nutrition5k", "Recipe1M"))]
    files = sorted({path for folder in folders for pattern in _PATTERNS for path in folder.glob(pattern)})
    vireo = next((f for f in (source, source / "VireoFood172") if (f / "foodlist.json").is_file()), None)
    if not files and vireo is None:
        raise RecordError(
            f"{source}: expected {' or '.join(_PATTERNS)} or VireoFood172/foodlist.json, found none"
        )
    seen: dict[str, int] = {}
    for path in files:
        split = next((name for name in ("train", "val", "test") if f"_{name}" in path.stem), None)
        for entry in read_json_array(path, log, keys=("conversations",)):
            notes: list[str] = []
            try:
                picture, name = _picture(path.parent, entry.value, split or "train")
                turns = turns_of(_said(entry.value.get("conversations")), 1, notes.append)
            except Broken as error:
                log.leave_out_broken(error.reason, file=path, line=entry.line, detail=error.detail)
                continue
            if picture is None:
                log.leave_out("no picture on disk", file=path, line=entry.line, detail=name)
                continue
            for note in notes:
                log.note(note, file=path, line=entry.line)
            seen[name] = seen.get(name, 0) + 1
            identifier = name if seen[name] == 1 else f"{name}_{seen[name]}"
            about = "food-dialogues" if path.name.startswith("FoodDialogues") else "recipe1m-dialogues"
            yield FoodRecord(identifier, str(picture.resolve()), about, split=split, conversation=turns)
    if vireo is not None:
        yield from _vireo(vireo, log)


def _said(messages: object) -> list[Said]:
    if not isinstance(messages, list):
        raise Broken("no conversations", f"expected a list, got {shown(messages)}")
    said = []
    for message in messages:
        form = message.get("form", message.get("from")) if isinstance(message, dict) else None
        text = message.get("value") if isinstance(message, dict) else None
        if not isinstance(text, str):
            raise Broken("a message that is no text", shown(text))
        role = _FORMS.get(form) or role_of(form) if isinstance(form, str) else role_of(form)
        text = text.split("</s>")[0]
        text = re.sub(r"\{(.*?)\}", r"\1", text) if role == "user" else _MARK.sub("", text)
        said.append(Said(role, text.strip()))
    # a greeting of the assistant before the first question
    return said[1:] if said and said[0].role == "assistant" else said


def _picture(folder: Path, entry: dict[str, Any], split: str) -> tuple[Path | None, str]:
    """(picture, the entry's name)."""
    if entry.get("dish_id") is not None:
        name = safe_name(str(entry["dish_id"]))
        dish = look_up(folder / "images" / name)
        frames = sorted(p for p in dish.glob("*") if p.suffix.lower() in _SUFFIXES) if dish.is_dir() else []
        return next((p for p in frames if p.name == "rgb.png"), frames[0] if frames else None), name
    name = safe_path(entry["image"]) if isinstance(entry.get("image"), str) else safe_name(entry.get("image"))
    last = name.rsplit("/", 1)[-1]
    letters = unicodedata.normalize("NFC", last)[:4]
    places = [folder / "images" / part / Path(*letters) / last for part in (split, "")]
    places += [folder / "images" / split / name, folder / "images" / name, folder / name]
    return next((place for place in map(look_up, places) if place.is_file()), None), last.rsplit(".", 1)[0]


def _vireo(folder: Path, log: ReadLog) -> Iterator[FoodRecord]:
    classes, lines = (_texts(folder / name) for name in ("foodlist.json", "ingre.json"))
    listed = dict(line.split(" ", 1) for line in lines if " " in line)
    for split in ("train", "val", "test"):
        path = folder / f"{split}_id.json"
        for text in _texts(path) if path.is_file() else ():
            try:
                name = safe_path(text)
                number = name.split("/", 1)[0]
                if not number.isdecimal() or not 1 <= int(number) <= len(classes):
                    raise Broken("an unknown class", shown(text))
            except Broken as error:
                log.leave_out_broken(error.reason, file=path, detail=error.detail)
                continue
            picture = look_up(folder / "ready_chinese_food" / name)
            if not picture.is_file():
                log.leave_out("no picture on disk", file=path, detail=text)
                continue
            names = dict.fromkeys(n.strip().lower() for n in listed.get(text, "").split(",") if n.strip())
            yield FoodRecord(
                f"vireofood172-{name.removesuffix('.jpg')}",
                str(picture.resolve()),
                "vireofood-172",
                category=classes[int(number) - 1],
                ingredients=tuple(map(Ingredient, names)),
                split=split,
            )


def _texts(path: Path) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise RecordError(f"{path}: expected a list of texts, got {shown(found)}")
    return found
