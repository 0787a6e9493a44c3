"""Photographs of groceries in shops (Klasson et al., 2019, the "Grocery Store Dataset"): `photos.json` beside `images/`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.look_up import look_up
from rode_food.readers.common import Broken, safe_path, split_of, text_of, unique
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.records import SPLITS, FoodRecord

KEYS = ("id", "image", "product", "kind")


def read(source: Path, log: ReadLog) -> Iterator[FoodRecord]:
    """Reads `source/photos.json`; the category is the `kind`, and an id is PRODUCT/PHOTOGRAPH. Splits are the official ones.

    They are by photograph: each product stands in all of them, so that nothing is learned about unseen products.

    Raises:
        RecordError: the file holds no JSON array; a broken entry, if `log.strict`.
    """
    path = source / "photos.json"
    for entry in unique(read_json_array(path, log, keys=KEYS), path, log):
        try:
            record = _record(source, entry.value)
        except Broken as error:
            log.leave_out_broken(error.reason, file=path, line=entry.line, detail=error.detail)
            continue
        yield record


def _record(source: Path, entry: dict[str, Any]) -> FoodRecord:
    image, product, kind = (text_of(entry.get(key), f"the {key}") for key in ("image", "product", "kind"))
    if image is None or product is None or kind is None:
        raise Broken("no image, product or kind", str(entry["id"]))
    return FoodRecord(
        id=f"{product.replace(' ', '-').replace('/', '-')}/{entry['id']}",
        image=str(look_up(source / safe_path(image)).resolve()),
        source="grocery-store",
        title=product,
        category=kind,
        split=split_of(entry.get("split"), {split: split for split in SPLITS}),
    )
