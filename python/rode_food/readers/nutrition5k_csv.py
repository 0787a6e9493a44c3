"""Nutrition5k (Thames et al., CVPR 2021) as gs://nutrition5k_dataset holds it, and as FoodLMM's authors cut it down.

    metadata/dish_metadata_cafe1.csv, dish_metadata_cafe2.csv   no header; a dish a row:
        dish_id, total_calories, total_mass, total_fat, total_carb, total_protein[, num_ingrs],
        (ingr_id, ingr_name, grams, calories, fat, carb, protein)*
    metadata/ingredients_metadata.csv                           ingr, id, cal/g, fat(g), carb(g), protein(g)
    dish_ids/splits/rgb_train_ids.txt, rgb_test_ids.txt         a dish id a line (4,059 and 709)
    imagery/realsense_overhead/DISH/rgb.png                     not every dish has one
    imagery/side_angles/DISH/**/camera_A_*.jpeg                 frames, once the dataset's script has cut them from the videos

The README in github.com/google-research-datasets/Nutrition5k has num_ingrs in its rows, the files have not: both are read.
huggingface.co/datasets/Yueha0/FoodDialogues, which FoodLMM's README points to, has the same CSVs in the folder itself,
train_id.json and test_id.json for the split, and images/DISH/rgb.png beside frames in the same folder: read as well.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

from rode_food.look_up import look_up
from rode_food.readers.common import Broken, first_existing, number_of, read_lines, safe_name, shown
from rode_food.readers.log import ReadLog
from rode_food.records import NUTRITION_FIELDS, FoodRecord, Ingredient, Nutrition, RecordError

TOLERANCE = 0.02
"""By which a dish's totals may miss the sums over its ingredients, relative, before that is noted."""
_ORDER = ("energy", "mass", "fat", "carb", "protein")  # of a dish's totals
_INGREDIENT_ORDER = ("mass", "energy", "fat", "carb", "protein")
_COLUMNS = 7  # of an ingredient
DEPRECATED = "deprecated"
"""What the rows call an ingredient that the table has no more."""
FOODLMM_INGREDIENTS = 20
FOODLMM_LEAST = 1.0  # of kcal and of grams: what has no more is not named


def read(source: Path, log: ReadLog, *, foodlmm: bool = False) -> Iterator[FoodRecord]:
    """One record for each dish that has a picture, a mass and a place in the official RGB split (train or test).

    The dish's own totals are taken, not the sums over its ingredients; a dish whose totals miss these by more than 2 % is
    kept and noted; a total of 0 where an ingredient has some is unknown. An ingredient without a name, or called
    "deprecated", is in the totals but not among the ingredients; that is noted too. A dish outside the official split is
    left out, for scans of one plate, ingredient by ingredient, lie together in one split, and any other would part them.

    Args:
        foodlmm: select as FoodLMM's loader does (utils/nutrition5k_dataset.py, github.com/YuehaoYin/FoodLMM), which takes
            pictures alone, no depth: ingredients of at most 1 g or 1 kcal are not named; of the rest the 20 heaviest are,
            heaviest first; a dish with none left, or with an ingredient that is nameless or called "deprecated", is left
            out; where there is no overhead picture, a frame of side camera A or D stands for it. Totals stay as they are.

    Raises:
        RecordError: a file of the layout is missing; a broken row, if `log.strict`.
    """
    tables = [source / "metadata", source]
    files = [
        first_existing((table / f"dish_metadata_{cafe}.csv" for table in tables), "dishes")
        for cafe in ("cafe1", "cafe2")
    ]
    splits = _splits(source, log)
    names = _names(tables, log)
    seen: set[str] = set()
    for path in files:
        for line, row in _rows(path, log):
            try:
                dish = _dish(row, names)
                if dish.id in seen:
                    raise Broken("an id that stands twice", dish.id)
            except Broken as error:
                log.leave_out_broken(error.reason, file=path, line=line, detail=error.detail)
                continue
            seen.add(dish.id)
            nameless = any(not i.name for i in dish.ingredients)
            ingredients, reason = tuple(i for i in dish.ingredients if i.name), None
            if foodlmm:
                ingredients = _foodlmm(ingredients)
                if nameless:
                    reason = "a nameless or deprecated ingredient"
                elif not ingredients:
                    reason = "no ingredient that FoodLMM names"
            image = _picture(source, dish.id, side=foodlmm)
            if image is None:
                reason = "no picture"
            elif not (dish.nutrition and dish.nutrition.mass):
                reason = "no mass"
            elif dish.id not in splits:
                reason = "no place in the official split"
            if reason:
                log.leave_out(reason, file=path, line=line, detail=dish.id)
                continue
            if nameless:
                log.note("a nameless or deprecated ingredient", file=path, line=line, detail=dish.id)
            odd = misses(dish)
            if odd:
                log.note("totals that miss the sums of their ingredients", file=path, line=line, detail=odd)
            yield FoodRecord(
                id=dish.id,
                image=str(image),
                source="nutrition5k",
                ingredients=ingredients,
                nutrition=_known(dish),
                split=splits[dish.id],
            )


def misses(dish: FoodRecord) -> str:
    """The total that misses the sum over the ingredients by more than 2 %; "" if none does."""
    for name in NUTRITION_FIELDS:
        total = getattr(dish.nutrition, name)
        parts = math.fsum(getattr(i.nutrition, name) for i in dish.ingredients)
        if abs(total - parts) > TOLERANCE * max(total, parts) + 1e-6:
            return f"{dish.id}: {name} {total:.6g}, its ingredients' {parts:.6g}"
    return ""


def _known(dish: FoodRecord) -> Nutrition:
    """The totals, those of 0 as unknown where an ingredient has some: all of cafe 2 has no energy, by its totals."""
    assert dish.nutrition is not None
    known: dict[str, float | None] = {}
    for name in NUTRITION_FIELDS:
        total = getattr(dish.nutrition, name)
        contradicted = total == 0 and any(getattr(i.nutrition, name) for i in dish.ingredients)
        known[name] = None if contradicted else total
    return Nutrition(**known, micronutrients=dish.nutrition.micronutrients)


def _rows(path: Path, log: ReadLog) -> Iterator[tuple[int, list[str]]]:
    for line, text in read_lines(path, log):
        try:
            yield line, next(csv.reader([text]))
        except csv.Error as error:
            log.leave_out_broken("a row that is no CSV", file=path, line=line, detail=str(error))


def _dish(row: list[str], names: dict[str, str]) -> FoodRecord:
    """The dish of a row, whatever it is worth; its image is empty and nameless ingredients have the name ""."""
    row = list(row)
    while row and not row[-1].strip():  # rows of a table that was saved as a rectangle
        row.pop()
    rest = row[1 + len(_ORDER) :]
    count = None
    if len(rest) % _COLUMNS == 1:
        count, rest = rest[0], rest[1:]
    if len(row) <= len(_ORDER) or len(rest) % _COLUMNS:
        raise Broken("a row of the wrong length", f"{len(row)} columns")
    if count is not None and number_of(count, "num_ingrs") != len(rest) // _COLUMNS:
        raise Broken(
            "a wrong number of ingredients", f"{shown(count)}, but there are {len(rest) // _COLUMNS}"
        )
    totals = dict(zip(_ORDER, row[1:], strict=False))
    ingredients = []
    for at in range(0, len(rest), _COLUMNS):
        identifier, name, *values = rest[at : at + _COLUMNS]
        nutrition = _numbers(dict(zip(_INGREDIENT_ORDER, values, strict=True)))
        name = name.strip().lower() or names.get(identifier.strip(), "")
        name = "" if name == DEPRECATED else name
        ingredients.append(
            Ingredient(name, amount=nutrition.mass, unit="g", mass=nutrition.mass, nutrition=nutrition)
        )
    return FoodRecord(
        id=safe_name(row[0].strip()),
        image="",
        source="nutrition5k",
        ingredients=tuple(ingredients),
        nutrition=_numbers(totals),
    )


def _numbers(values: dict[str, str]) -> Nutrition:
    return Nutrition(**{key: number_of(value, key) for key, value in values.items()}, micronutrients={})


def _foodlmm(ingredients: tuple[Ingredient, ...]) -> tuple[Ingredient, ...]:
    named = [
        i
        for i in ingredients
        if i.nutrition is not None
        and (i.nutrition.mass or 0.0) > FOODLMM_LEAST
        and (i.nutrition.energy or 0.0) > FOODLMM_LEAST
    ]
    return tuple(sorted(named, key=lambda i: -(i.mass or 0.0))[:FOODLMM_INGREDIENTS])


def _picture(source: Path, dish: str, *, side: bool) -> Path | None:
    for folder in (source / "imagery" / "realsense_overhead", source / "images"):
        picture = look_up(folder / dish / "rgb.png")
        if picture.is_file():
            return picture.resolve()
    if side:
        for folder in (source / "imagery" / "side_angles", source / "images"):
            frames = sorted(look_up(folder / dish).rglob("*.jp*g"))
            chosen = [f for f in frames if f.name.startswith(("camera_A", "camera_D"))] or frames
            if chosen:
                return chosen[len(chosen) // 2].resolve()  # the middle of the sweep
    return None


def _splits(source: Path, log: ReadLog) -> dict[str, str]:
    """dish id -> train or test."""
    found: dict[str, str] = {}
    for split in ("train", "test"):
        places = [source / "dish_ids" / "splits", source / "splits", source]
        path = first_existing(
            [*(place / f"rgb_{split}_ids.txt" for place in places), source / f"{split}_id.json"],
            "the official split",
        )
        if path.suffix == ".json":
            ids = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(ids, list) or not all(isinstance(dish, str) for dish in ids):
                raise RecordError(f"{path}: expected a list of dish ids, got {shown(ids)}")
        else:
            ids = [dish for _, dish in read_lines(path, log)]
        for dish in ids:
            if found.setdefault(dish, split) != split:
                raise RecordError(f"{path}: {dish} is in the training split already")
    return found


def _names(tables: list[Path], log: ReadLog) -> dict[str, str]:
    """ingr_0000000001 -> name; empty without the table, which only names what a row leaves nameless."""
    for table in tables:
        for name in ("ingredients_metadata.csv", "ingredient_metadata.csv"):
            if (table / name).is_file():
                return {
                    f"ingr_{int(row[1]):010d}" if row[1].isdigit() else row[1]: row[0].strip().lower()
                    for _, row in _rows(table / name, log)
                    if len(row) > 1
                }
    return {}
