"""VireoFood-172 (Chen and Ngo, ACM MM 2016) and VireoFood-251 (Chen et al., TIP 2021): Chinese dishes with ingredients.

VireoFood-172, as VireoFood172.zip and SplitAndIngreLabel.zip unpack and as code that reads them agrees (for instance
github.com/maxium0526/mlcpl):

    ready_chinese_food/CLASS/PICTURE.jpg      CLASS is 1 to 172; VireoFood172_ori/ for the larger pictures
    SplitAndIngreLabel/FoodList.txt           the name of class N on line N
    SplitAndIngreLabel/IngredientList.txt     353 ingredients, one a line
    SplitAndIngreLabel/IngreLabel.txt         "/CLASS/PICTURE.jpg v1 ... v353" a line: 1 for there, -1 or 0 for not
    SplitAndIngreLabel/TR.txt, VAL.txt, TE.txt   "/CLASS/PICTURE.jpg" a line

VireoFood-251 comes from the same laboratory, 406 ingredients in place of 353. No description of its files could be found,
and one loader, which names the folders VireoFood251_ori/ and SplitAndIngreLabel-406/ and reads label files that its authors
made: this reader takes the files of VireoFood-172 under those names of folders, and says what it misses if they differ.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path

from rode_food.readers.common import Broken, first_existing, read_lines, shown
from rode_food.readers.labelled import names_in, records
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient, RecordError

IMAGES_172 = ("ready_chinese_food", "VireoFood172/ready_chinese_food", "VireoFood172_ori")
LABELS_172 = ("SplitAndIngreLabel", "VireoFood172/SplitAndIngreLabel")
IMAGES_251 = ("VireoFood251_ori", "VireoFood251")
LABELS_251 = ("SplitAndIngreLabel-406", "SplitAndIngreLabel")
_LISTS = {"TR.txt": "train", "VAL.txt": "val", "TE.txt": "test"}


def read_172(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """One record a picture of TR, VAL and TE: class as category, labelled ingredients, official split.

    A picture without a line in IngreLabel.txt has no ingredients and is noted. Raises RecordError for a missing file.
    """
    return _read(source, log, "vireofood-172", IMAGES_172, LABELS_172)


def read_251(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """As `read_172`, with the folders of VireoFood-251."""
    return _read(source, log, "vireofood-251", IMAGES_251, LABELS_251)


def _read(
    source: Path, log: ReadLog, name: str, images: tuple[str, ...], labels: tuple[str, ...]
) -> Iterator[FoodRecord]:
    root = first_existing((source / folder for folder in images), "pictures")
    folder = first_existing((source / label for label in labels), "labels")
    files = {
        file: first_existing([folder / file], "labels")
        for file in ("FoodList.txt", "IngredientList.txt", "IngreLabel.txt", *_LISTS)
    }
    classes = names_in(files["FoodList.txt"], log)
    vocabulary = [Ingredient(name.lower()) for name in names_in(files["IngredientList.txt"], log)]
    if not vocabulary:
        raise RecordError(f"{files['IngredientList.txt']}: no ingredient in it")
    labelled = _labels(files["IngreLabel.txt"], len(vocabulary), log)

    def read_line(text: str) -> tuple[str, str]:
        path = text.split()[0]
        number = path.removeprefix("/").partition("/")[0]
        if not number.isdecimal() or not 1 <= int(number) <= len(classes):
            raise Broken("an unknown class", text)
        return path, classes[int(number) - 1]

    def ingredients(path: str) -> tuple[Ingredient, ...]:
        found = labelled.get(path.removeprefix("/"))
        if found is None:
            log.note("no ingredient labels", file=files["IngreLabel.txt"], detail=path)
        return tuple(vocabulary[i] for i in found or ())

    lists = [(files[file], split, read_lines(files[file], log)) for file, split in _LISTS.items()]
    return records(lists, root, name, log, read_line, ingredients)


def _labels(path: Path, size: int, log: ReadLog) -> dict[str, array[int]]:
    """Picture -> places of its ingredients in the list."""
    found: dict[str, array[int]] = {}
    for number, text in read_lines(path, log):
        picture, *values = text.split()
        if len(values) != size or not {*values} <= {"1", "0", "-1"}:
            log.leave_out_broken(
                "ingredient labels of another form",
                file=path,
                line=number,
                detail=f"expected {size} of 1, 0 or -1, got {len(values)}: {shown(' '.join(values))}",
            )
        else:
            found[picture.removeprefix("/")] = array(
                "H", (i for i, value in enumerate(values) if value == "1")
            )
    return found
