"""Recipe1M (Salvador et al., CVPR 2017; Marin et al., 2018), as im2recipe.csail.mit.edu gives it out on request.

    layer1.json      [{id, title, url, partition, ingredients: [{text}], instructions: [{text}]}]
    layer2.json      [{id, images: [{id, url}]}]; layer2+.json in Recipe1M+, the same with more pictures
    det_ingrs.json   [{id, valid: [bool], ingredients: [{text}]}], names found in the lines of layer1

The JSON files lie in the folder itself or in `recipe1M/` or `recipe1M_layers/` below it. A picture IMG = "0fa8309c13.jpg"
lies in four folders of one letter each, `0/f/a/8/IMG`, below whichever of these is there: `images/` (im2recipe-Pytorch's
README; the Recipe1M+ archives), `images/PARTITION/` (what inversecooking's data_loader.py opens), and
`recipe1M_images_PARTITION/` or that and `PARTITION/` once more (what recipe1M_images_train.tar and its sisters unpack to).
"""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.look_up import look_up
from rode_food.readers.common import (
    NO_INGREDIENT,
    Broken,
    first_existing,
    line_to_ingredient,
    safe_name,
    split_of,
    text_of,
    texts_of,
    unique,
)
from rode_food.readers.index import JsonIndex
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.records import SPLITS, FoodRecord, Ingredient

FOLDERS = ("", "recipe1M", "recipe1M_layers")
_PARTITIONS = {name: name for name in SPLITS}


def read(source: Path, log: ReadLog, *, images_per_recipe: int = 1) -> Iterator[FoodRecord]:
    """One record for each recipe and each of its first `images_per_recipe` pictures that exist.

    `id` is the recipe's for the first picture, `RECIPE_2` for the second, and so on. An ingredient keeps the recipe's line
    as `text`; amount, unit and mass come from the line; the name is det_ingrs' where that holds one for this line and says
    that it is valid, else what the line parses to. A line that is a heading is left out. A recipe without instructions is
    kept if it has ingredients, and the other way round. Memory: 48 bytes a recipe for the two indexes and about 100 for
    the ids seen.

    Raises:
        RecordError: layer1 or layer2 is missing or no JSON array; a broken entry, if `log.strict`.
    """
    layer1 = first_existing((source / folder / "layer1.json" for folder in FOLDERS), "layer1")
    names_file = layer1.with_name("det_ingrs.json")
    pictures = Pictures(source, log)
    names = None
    try:
        if names_file.exists():
            names = JsonIndex(names_file, log, keys=("id", "valid", "ingredients"))
        else:
            log.note("no det_ingrs.json: names come from the lines", file=names_file)
        for entry in unique(read_json_array(layer1, log, keys=("id", "title", "ingredients")), layer1, log):
            try:
                lost: list[str] = []
                record = _record(entry.value, names, lost)
                if not record.ingredients and not record.instructions:
                    log.leave_out("neither ingredients nor instructions", file=layer1, line=entry.line)
                    continue
            except Broken as error:
                log.leave_out_broken(error.reason, file=layer1, line=entry.line, detail=error.detail)
                continue
            for line in lost:
                log.note(NO_INGREDIENT, file=layer1, line=entry.line, detail=line)
            yield from pictures.records(record, images_per_recipe, layer1, entry.line)
    finally:
        pictures.close()
        if names is not None:
            names.close()


def _record(entry: dict[str, Any], names: JsonIndex | None, lost: list[str]) -> FoodRecord:
    lines = texts_of(entry.get("ingredients"), "ingredients")
    return FoodRecord(
        id=entry["id"],
        image="",
        source="recipe1m",
        split=split_of(entry.get("partition"), _PARTITIONS),
        title=None if entry.get("title") is None else text_of(entry["title"], "a title"),
        ingredients=tuple(_ingredients(lines, _valid_names(names, entry["id"], len(lines)), lost)),
        instructions=tuple(filter(None, texts_of(entry.get("instructions"), "instructions"))),
    )


def _ingredients(lines: list[str | None], names: list[str | None], lost: list[str]) -> Iterator[Ingredient]:
    """`lost` is given the lines that name nothing."""
    for line, name in zip(lines, names, strict=True):
        found = None if line is None else line_to_ingredient(line)
        if name is None:
            if found is not None:
                yield found
            elif line is not None:
                lost.append(line)
        elif found is not None:
            # ten million times: not replace()
            yield Ingredient(name, found.amount, found.unit, found.mass, text=line)
        elif line is not None:
            yield Ingredient(name, text=line)


def _valid_names(names: JsonIndex | None, identifier: str, count: int) -> list[str | None]:
    """det_ingrs' name of each line, None where it is not valid, or where the lists do not align."""
    found = None if names is None else names.get(identifier)
    if found is not None:
        valid, texts = found.value["valid"], found.value["ingredients"]
        if isinstance(valid, list) and isinstance(texts, list) and len(valid) == len(texts) == count:
            return [
                " ".join(item["text"].split()).lower() or None
                if ok is True and isinstance(item, dict) and isinstance(item.get("text"), str)
                else None
                for ok, item in zip(valid, texts, strict=True)
            ]
    return [None] * count


def _letters(name: str) -> str:
    """The four letters that name a picture's folders; empty where the name does not begin with four."""
    letters = unicodedata.normalize("NFC", name)[:4]
    return letters if len(letters) == 4 and letters.isalnum() else ""


class Pictures:
    """The pictures of recipes, by layer2."""

    def __init__(self, source: Path, log: ReadLog) -> None:
        files = [source / folder / name for folder in FOLDERS for name in ("layer2+.json", "layer2.json")]
        self.log = log
        self.index = JsonIndex(first_existing(files, "layer2"), log, keys=("id", "images"))
        self.roots: dict[str, list[str]] = {}
        for split in SPLITS:
            tarred = source / f"recipe1M_images_{split}"
            roots = (source / "images", source / "images" / split, tarred, tarred / split)
            self.roots[split] = [str(root.resolve()) for root in roots if root.is_dir()]

    def close(self) -> None:
        self.index.close()

    def records(self, recipe: FoodRecord, count: int, file: Path, line: int) -> Iterator[FoodRecord]:
        """`recipe` with each of its first `count` pictures that exist; the log is told if there is none."""
        found = self.index.get(recipe.id)
        images = None if found is None else found.value["images"]
        if found is None or images == []:
            self.log.leave_out("no picture", file=file, line=line)
            return
        try:
            if not isinstance(images, list):
                raise Broken("images that are no list")
            names = [safe_name(image.get("id") if isinstance(image, dict) else image) for image in images]
            if any(not _letters(name) for name in names):
                raise Broken("a picture's name of odd letters", ", ".join(names))
        except Broken as error:
            self.log.leave_out_broken(
                error.reason, file=self.index.path, line=found.line, detail=error.detail
            )
            return
        number = 0
        for name in dict.fromkeys(names):
            path = self.find(name, recipe.split or "")
            if path is not None:
                number += 1
                identifier = recipe.id if number == 1 else f"{recipe.id}_{number}"
                yield dataclasses.replace(recipe, id=identifier, image=path)
                if number == count:
                    return
        if number == 0:
            self.log.leave_out("no picture on disk", file=file, line=line, detail=names[0])

    def find(self, name: str, split: str) -> str | None:
        below = os.path.join(*_letters(name), name)
        roots = self.roots[split]
        for number, root in enumerate(roots):
            path = os.path.join(root, below)
            if not name.isascii():
                path = str(look_up(Path(path)))
            if os.path.isfile(path):
                if number:  # pictures of a split lie together
                    roots.insert(0, roots.pop(number))
                return path
        return None
