"""Food-101 (Bossard et al., ECCV 2014), as food-101.tar.gz unpacks: 101 classes of 1,000 pictures.

    images/CLASS/ID.jpg
    meta/classes.txt            a class a line: apple_pie
    meta/train.txt, test.txt    a picture a line: apple_pie/1005649
    meta/train.json, test.json  the same: {"apple_pie": ["apple_pie/1005649", ...], ...}
    meta/labels.txt             the classes once more, as titles; not read

The folder that holds `images/` and `meta/`, or the one above it with `food-101/` in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from rode_food.readers.common import Broken, first_existing, read_lines, shown
from rode_food.readers.labelled import Listed, records
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, RecordError


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """One record a picture of the lists, with its class as category ("apple pie") and the official split, train or test.

    train.txt is read, or train.json where there is no .txt; likewise test. Raises RecordError for a file that is missing.
    """
    meta = first_existing((source / "meta", source / "food-101" / "meta"), "meta")
    classes_file = first_existing([meta / "classes.txt"], "classes")
    classes = {text for _, text in read_lines(classes_file, log)}

    def read_line(text: str) -> tuple[str, str]:
        name = text.partition("/")[0]
        if name not in classes:
            raise Broken("an unknown class", text)
        return f"{text}.jpg", name.replace("_", " ")

    lists = []
    for split in ("train", "test"):
        path = first_existing((meta / f"{split}.txt", meta / f"{split}.json"), f"the {split} split")
        lists.append((path, split, _json(path) if path.suffix == ".json" else read_lines(path, log)))
    return records(lists, meta.parent / "images", "food-101", log, read_line)


def _json(path: Path) -> Iterator[Listed]:
    listed = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(listed, dict) or not all(isinstance(names, list) for names in listed.values()):
        raise RecordError(f"{path}: expected an object of lists, got {shown(listed)}")
    return iter([(1, str(picture)) for names in listed.values() for picture in names])
