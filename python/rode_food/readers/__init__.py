"""Readers: each turns one published layout into records.

A reader is a function `(source: Path, log: ReadLog, **options) -> Iterator[FoodRecord]`. It tells the log what it leaves
out and why, so that nothing vanishes unsaid, and takes the data's own split where there is one. It streams: its memory
does not grow with the records, except for what it must know of each (an id, an offset).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rode_food.readers import (
    food2k,
    food101,
    food_dialogues,
    food_photos,
    grocery_store,
    llava_instruct,
    messages,
    nutrition5k,
    nutrition5k_csv,
    recipe1m,
    recipe1m_plus,
    records_file,
    vireo,
    weighed_food,
)
from rode_food.readers.file_kind import file_kind
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord


@dataclass(frozen=True)
class Option:
    """An option of a reader: a bool, a whole number of at least 1 or a text, and a line about it."""

    default: bool | int | str
    about: str


@dataclass(frozen=True)
class Reader:
    """One layout.

    Attributes:
        read: the function.
        about: a line.
        signs: files and folders by which the layout is known: of each tuple one is there, below the source.
        keys: of the first entry of `photos.json`, by which layouts with that file are told apart.
        options: names of `OPTIONS` that it takes.
        takes: the source is a file, a folder, or either.
        embeds: pictures may stand in the source itself; the reader is given a folder for them.
    """

    read: Callable[..., Iterator[FoodRecord]]
    about: str
    signs: tuple[tuple[str, ...], ...]
    keys: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    takes: str = "folder"
    embeds: bool = False


OPTIONS = {
    "images_per_recipe": Option(1, "pictures of one recipe that make a record each"),
    "derive_carb": Option(
        False, "carbohydrate = (energy - 9 fat - 4 protein) / 4 where that is not negative"
    ),
    "image_folder": Option("", "folder to which pictures' paths are relative; else the data's own"),
    "foodlmm": Option(False, "select dishes and ingredients as FoodLMM does"),
    "usda": Option("", "folder of USDA's tables, for nutrition; else usda/ beside the source"),
}
"""Name, as a keyword of readers and, with dashes, a flag of `rode data`, -> what it is."""


def _below(folders: tuple[str, ...], *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" if folder else name for folder in folders for name in names)


_CAFES = _below(("metadata", ""), "dish_metadata_cafe1.csv")

READERS = {
    "recipe1m-plus": Reader(
        recipe1m_plus.read,
        "Recipe1M+'s recipes with nutrition, and its pictures",
        (
            _below(recipe1m.FOLDERS, recipe1m_plus.FILE),
            _below(recipe1m.FOLDERS, "layer2+.json", "layer2.json"),
        ),
        options=("images_per_recipe", "derive_carb"),
    ),
    "recipe1m": Reader(
        recipe1m.read,
        "Recipe1M: layer1, layer2, det_ingrs and pictures",
        (_below(recipe1m.FOLDERS, "layer1.json"), _below(recipe1m.FOLDERS, "layer2+.json", "layer2.json")),
        options=("images_per_recipe",),
    ),
    "nutrition5k": Reader(
        nutrition5k_csv.read,
        "Nutrition5k's own CSV files, split and pictures",
        (_CAFES,),
        options=("foodlmm",),
    ),
    "nutrition5k-jsonl": Reader(
        nutrition5k.read_jsonl, "Nutrition5k as dishes.jsonl beside sample_images/", (("dishes.jsonl",),)
    ),
    "food-101": Reader(
        food101.read, "Food-101: images/ and meta/", (("meta/classes.txt", "food-101/meta/classes.txt"),)
    ),
    "food2k": Reader(
        food2k.read, "Food2K: pictures by class, lists and names", (_below(food2k.LABELS, food2k.NAMES),)
    ),
    "vireofood-251": Reader(
        vireo.read_251,
        "VireoFood-251: pictures by class, SplitAndIngreLabel-406/",
        (vireo.IMAGES_251, _below(vireo.LABELS_251, "IngreLabel.txt")),
    ),
    "vireofood-172": Reader(
        vireo.read_172,
        "VireoFood-172: ready_chinese_food/ and SplitAndIngreLabel/",
        (vireo.IMAGES_172, _below(vireo.LABELS_172, "IngreLabel.txt")),
    ),
    "weighed-food": Reader(
        weighed_food.read,
        "weighed portions, photographed many times: photos.json beside images/",
        (("photos.json",),),
        weighed_food.KEYS,
        ("usda",),
    ),
    "grocery-store": Reader(
        grocery_store.read,
        "groceries in shops: photos.json beside images/",
        (("photos.json",),),
        grocery_store.KEYS,
    ),
    "food-photos": Reader(
        food_photos.read,
        "photographs with a recipe each: photos.json beside images/",
        (("photos.json",),),
        food_photos.KEYS,
    ),
    "food-dialogues": Reader(
        food_dialogues.read,
        "FoodLMM's conversations: FoodDialogues, Recipe1M, VireoFood172 below one folder",
        (
            (
                "Nutrition5k/FoodDialogues_train.json",
                "FoodDialogues_train.json",
                "Recipe1M/recipe1m_train_1488.json",
                "recipe1m_train_1488.json",
                "VireoFood172/foodlist.json",
            ),
        ),
    ),
    "llava-instruct": Reader(
        llava_instruct.read,
        "a JSON array (or lines) of LLaVA-instruct conversations",
        (),
        options=("image_folder",),
        takes="file",
        embeds=True,
    ),
    "messages": Reader(
        messages.read,
        "rows with messages and images: JSON lines, Parquet, datasets",
        (("state.json", "dataset_dict.json"),),
        options=("image_folder",),
        takes="file or folder",
        embeds=True,
    ),
    "records": Reader(records_file.read, "a JSONL file of records (docs/records.md)", (), takes="file"),
}
"""Kind, as `rode data convert` takes it, -> reader; `guess_kind` tries them in this order."""


def read_source(
    kind: str,
    source: str | os.PathLike[str],
    log: ReadLog,
    *,
    pictures: str | os.PathLike[str] | None = None,
    **options: bool | int | str,
) -> Iterator[FoodRecord]:
    """The records of a source; its kind, place and options are checked before this returns.

    Args:
        kind: a key of `READERS`.
        source: the data's folder; the file for kind `records`.
        log: is told what is left out, or kept with a doubt.
        pictures: folder for pictures that stand in the source itself; SOURCE_pictures beside it by default.
        options: of `OPTIONS`; only those that the kind takes.

    Raises:
        ValueError: an unknown kind, a source that is not there, an option that the kind does not take or of another type.
    """
    if kind not in READERS:
        raise ValueError(f"kind: expected one of {', '.join(READERS)}, got {kind!r}")
    reader, source = READERS[kind], Path(source)
    fits = ("file" in reader.takes and source.is_file()) or ("folder" in reader.takes and source.is_dir())
    if not fits:
        raise ValueError(f"source: {source} is not a {reader.takes}")
    for name, value in options.items():
        if name not in reader.options:
            takes = ", ".join(reader.options) or "no options"
            raise ValueError(f"{name}: kind {kind} does not take it; it takes {takes}")
        default = OPTIONS[name].default
        if type(value) is not type(default) or (type(value) is int and value < 1):
            wanted = {bool: "true or false", int: "a whole number of at least 1"}.get(type(default), "text")
            raise ValueError(f"{name}: expected {wanted}, got {value!r}")
    if reader.embeds:
        beside = source.with_name(f"{source.name.partition('.')[0]}_pictures")
        return reader.read(source, log, Path(pictures) if pictures is not None else beside, **options)
    return reader.read(source, log, **options)


def guess_kind(source: str | os.PathLike[str]) -> str:
    """The kind whose files lie in a folder; that of a file by its content (`rode_food.file_kind`).

    Raises:
        ValueError: none do, with what was looked for, the file is of no kind that is read, or there is no such folder.
    """
    source = Path(source)
    if source.is_file():
        found = file_kind(source)
        if found.reader is None:
            raise ValueError(f"source: {source} is {found.name}; {found.advice}")
        return found.reader
    if not source.is_dir():
        raise ValueError(f"source: {source} is neither a folder nor a file")
    known = {kind: reader for kind, reader in READERS.items() if reader.signs}
    near = [
        kind
        for kind, reader in known.items()
        if all(any((source / name).exists() for name in names) for names in reader.signs)
    ]
    if len(near) > 1 and any(known[kind].keys for kind in near):
        first = next(read_json_array(source / "photos.json", ReadLog()), None)
        keys = set() if first is None else first.value.keys()
        # The last one, where none fits: its reader says what is missing.
        near = [kind for kind in near if keys >= set(known[kind].keys)] or near[-1:]
    if near:
        return near[0]
    wanted = "; ".join(
        f"{kind}: {' and '.join(n[0] for n in reader.signs)}" for kind, reader in known.items()
    )
    raise ValueError(f"source: {source} holds no layout that is known ({wanted}); name one with --kind")
