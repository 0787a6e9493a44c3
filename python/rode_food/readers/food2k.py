"""Food2K (Min et al., TPAMI 2023), given out on request: 2,000 classes, 1,036,564 pictures.

Read from code that uses it, for the publisher describes no layout:

    CLASS/*.jpg                                              CLASS is 0 to 1999; in the folder, Food2k_complete/ or images/
    train_finetune.txt, val_finetune.txt, test_finetune.txt  "CLASS/PICTURE.jpg CLASS" a line; in the folder,
                                                             Food2k_label/, Food2k_complete/, meta_data/ or meta/
    food2k_label2name_en.txt                                 "0000--name of the class" a line

The lists as in github.com/visym/vipy and github.com/Tonmoy-Ghosh/NoisyViT_Food; lists without the class
("/CLASS/PICTURE.jpg"; train.txt, val.txt, test.txt) and the names as in github.com/madehua98/FoodHealthMMLLM.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rode_food.readers.common import Broken, first_existing, read_lines
from rode_food.readers.labelled import records
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, RecordError

NAMES = "food2k_label2name_en.txt"
_IMAGES = ("Food2k_complete", "images", "")
LABELS = ("", "Food2k_label", "Food2k_complete", "meta_data", "meta")


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """One record a picture of the lists, with the official split; its category is the class's name.

    Raises:
        RecordError: no list or no names are there. Numbers are no answer to "what dish is this?".
    """
    lists = []
    for split in ("train", "val", "test"):
        found = [source / f / f"{split}{end}.txt" for f in LABELS for end in ("_finetune", "")]
        for path in filter(Path.is_file, found):
            lists.append((path, split, read_lines(path, log)))
            break
    if not lists:
        raise RecordError(
            f"lists of pictures: no train_finetune.txt or train.txt in {source} or {', '.join(LABELS[1:])}"
        )
    names_file = first_existing((source / f / NAMES for f in LABELS), "names of the classes")
    names = {}
    for number, text in read_lines(names_file, log):
        index, dash, name = text.partition("--")
        if not dash or not index.strip().isdecimal() or not name.strip():
            log.leave_out_broken("a class without number and name", file=names_file, line=number, detail=text)
        else:
            names[int(index)] = " ".join(name.replace("_", " ").split())

    def read_line(text: str) -> tuple[str, str]:
        path, _, label = text.partition(" ")
        folder = path.removeprefix("/").partition("/")[0]
        number = label.strip() or folder
        if not number.isdecimal() or int(number) not in names:
            raise Broken("an unknown class", text)
        return path, names[int(number)]

    root = next(source / f for f in _IMAGES if not f or (source / f).is_dir())
    return records(lists, root, "food2k", log, read_line)
