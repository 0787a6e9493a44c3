"""The food record: one JSON object per line, checked on the way in and on the way out.

`docs/records.md` describes the format for whoever writes such a file. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rode_food.atomic import replacing
from rode_food.opening import open_data

SPLITS = ("train", "val", "test")
NUTRITION_FIELDS = ("mass", "energy", "fat", "protein", "carb")
"""The five numbers of a dish in the order of the paper's tables: g, kcal, g, g, g."""


class RecordError(ValueError):
    """A record that does not fit the schema. The message is one line: where, which field, what it got."""


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, e.g. `Quantity(480.0, "mg")`."""

    value: float
    unit: str


@dataclass(frozen=True)
class Nutrition:
    """The nutrition of a dish, or of one ingredient as it is on the plate. None means unknown, 0 means none.

    Attributes:
        mass: grams.
        energy: kilocalories.
        fat: grams.
        protein: grams.
        carb: grams of carbohydrate.
        micronutrients: name -> quantity; any name, any unit.
    """

    mass: float | None = None
    energy: float | None = None
    fat: float | None = None
    protein: float | None = None
    carb: float | None = None
    micronutrients: Mapping[str, Quantity] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """True if all five of `NUTRITION_FIELDS` are known."""
        return all(getattr(self, name) is not None for name in NUTRITION_FIELDS)


@dataclass(frozen=True)
class Ingredient:
    """One ingredient: `amount` and `unit` as the recipe states them, `mass` in grams where it is known.

    `nutrition` is that of the whole `mass`, not of 100 g. `text` is the recipe's own line.
    """

    name: str
    amount: float | None = None
    unit: str | None = None
    mass: float | None = None
    nutrition: Nutrition | None = None
    text: str | None = None


@dataclass(frozen=True)
class Turn:
    """A free question and its answer, in words of their own. Both are text and nothing but text, whatever they hold."""

    question: str
    answer: str


PICTURE_MARK = "<image>"
"""The mark by which texts of other formats say where a picture stands; in a record's own texts it is text."""


@dataclass(frozen=True)
class FoodRecord:
    """One food sample.

    `image` is the first picture, "" where there is none; `more_images` are the others; `images` are all of them. In a file
    all stand in the field `image`: a path, a list of paths, or null. Paths are absolute after `read_records`; in the file
    they may be relative to the file's folder.
    `split` None means that the source has none: `rode_food.data_mixture.hash_split` makes one.
    `conversation` holds free questions and answers; each turn follows those before it.
    """

    id: str
    image: str
    source: str
    title: str | None = None
    category: str | None = None
    ingredients: tuple[Ingredient, ...] = ()
    instructions: tuple[str, ...] = ()
    nutrition: Nutrition | None = None
    split: str | None = None
    more_images: tuple[str, ...] = ()
    conversation: tuple[Turn, ...] = ()

    def __post_init__(self) -> None:
        if self.more_images and not self.image:
            raise ValueError(
                f"record {self.id!r}: more_images without an image; the first picture is `image`"
            )

    @property
    def images(self) -> tuple[str, ...]:
        """All pictures."""
        return (self.image, *self.more_images) if self.image else ()


def with_images(record: FoodRecord, images: Iterable[str]) -> FoodRecord:
    """The record with these pictures instead of its own."""
    first, *more = [*images] or [""]
    return FoodRecord(**{**record.__dict__, "image": first, "more_images": tuple(more)})


def _show(value: object) -> str:
    """A value as an error message shows it: JSON where it can be, and never longer than a line."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else text[:57] + "..."


def _object(value: object, known: tuple[str, ...], path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecordError(f"{path or 'record'}: expected an object, got {_show(value)}")
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known fields: {', '.join(known)}"
            raise RecordError(f"{_join(path, key)}: unknown field; {hint}")
    return value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _text(obj: dict[str, Any], key: str, path: str, *, required: bool = False) -> str | None:
    value = obj.get(key)
    if value is None and not required:
        return None
    if value is None:
        raise RecordError(f"{_join(path, key)}: missing; expected a non-empty string")
    if not isinstance(value, str) or not value.strip():
        raise RecordError(f"{_join(path, key)}: expected a non-empty string, got {_show(value)}")
    return value


def _number(value: object, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecordError(f"{path}: expected a number, got {_show(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise RecordError(f"{path}: expected a finite number >= 0, got {_show(value)}")
    return number


def _optional_number(obj: dict[str, Any], key: str, path: str) -> float | None:
    return None if obj.get(key) is None else _number(obj[key], _join(path, key))


def _list(obj: dict[str, Any], key: str) -> list[Any]:
    value = obj.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise RecordError(f"{key}: expected a list, got {_show(value)}")
    return value


@functools.cache
def _names(cls: type) -> tuple[str, ...]:
    return tuple(f.name for f in fields(cls) if f.name != "more_images")


def _nutrition(value: object, path: str) -> Nutrition | None:
    if value is None:
        return None
    obj = _object(value, _names(Nutrition), path)
    micro_path = _join(path, "micronutrients")
    micro = {} if obj.get("micronutrients") is None else obj["micronutrients"]
    if not isinstance(micro, dict):
        raise RecordError(f"{micro_path}: expected an object, got {_show(micro)}")
    quantities = {}
    for name, entry in micro.items():
        at = f"{micro_path}.{name}"
        entry = _object(entry, _names(Quantity), at)
        unit = _text(entry, "unit", at, required=True)
        quantities[name] = Quantity(_number(entry.get("value"), at + ".value"), unit or "")
    numbers = {name: _optional_number(obj, name, path) for name in NUTRITION_FIELDS}
    return Nutrition(**numbers, micronutrients=quantities)


def _ingredient(value: object, path: str) -> Ingredient:
    obj = _object(value, _names(Ingredient), path)
    return Ingredient(
        name=_text(obj, "name", path, required=True) or "",
        amount=_optional_number(obj, "amount", path),
        unit=_text(obj, "unit", path),
        mass=_optional_number(obj, "mass", path),
        nutrition=_nutrition(obj.get("nutrition"), _join(path, "nutrition")),
        text=_text(obj, "text", path),
    )


def _images(obj: dict[str, Any]) -> tuple[str, ...]:
    value = obj.get("image")
    if value is None:
        return ()
    if not isinstance(value, list):
        return (_text(obj, "image", "", required=True) or "",)
    for i, path in enumerate(value):
        if not isinstance(path, str) or not path.strip():
            raise RecordError(f"image[{i}]: expected a non-empty string, got {_show(path)}")
    return tuple(value)


def _turn(value: object, path: str) -> Turn:
    obj = _object(value, _names(Turn), path)
    return Turn(*(_text(obj, key, path, required=True) or "" for key in ("question", "answer")))


def record_from_json(value: object) -> FoodRecord:
    """Builds a record from a decoded JSON object; `image` is taken as it stands.

    Raises:
        RecordError: naming the field, what it got and what was wanted.
    """
    obj = _object(value, _names(FoodRecord), "")
    split = obj.get("split")
    if split is not None and split not in SPLITS:
        raise RecordError(f"split: expected one of {', '.join(SPLITS)} or null, got {_show(split)}")
    if obj.get("source") == "all":
        raise RecordError('source: "all" stands for all sources together in the metrics; choose another name')
    instructions = _list(obj, "instructions")
    for i, step in enumerate(instructions):
        if not isinstance(step, str) or not step.strip():
            raise RecordError(f"instructions[{i}]: expected a non-empty string, got {_show(step)}")
    image, *more_images = _images(obj) or ("",)
    return FoodRecord(
        id=_text(obj, "id", "", required=True) or "",
        image=image,
        source=_text(obj, "source", "", required=True) or "",
        title=_text(obj, "title", ""),
        category=_text(obj, "category", ""),
        ingredients=tuple(
            _ingredient(entry, f"ingredients[{i}]") for i, entry in enumerate(_list(obj, "ingredients"))
        ),
        instructions=tuple(instructions),
        nutrition=_nutrition(obj.get("nutrition"), "nutrition"),
        split=split,
        more_images=tuple(more_images),
        conversation=tuple(
            _turn(entry, f"conversation[{i}]") for i, entry in enumerate(_list(obj, "conversation"))
        ),
    )


def record_as_written(obj: Mapping[str, Any]) -> FoodRecord:
    """The inverse of `record_to_json`, in a quarter of `record_from_json`'s time: nothing is checked again.

    Raises:
        TypeError, ValueError, KeyError, AttributeError: for most of what is not such a result.
    """
    values = dict(obj)
    values["ingredients"] = tuple(
        Ingredient(**{key: _as_written(key, value) for key, value in entry.items()})
        for entry in values.get("ingredients", ())
    )
    values["instructions"] = tuple(values.get("instructions", ()))
    values["conversation"] = tuple(Turn(**entry) for entry in values.get("conversation", ()))
    image = values.get("image", "")
    if isinstance(image, list):
        values["image"], values["more_images"] = image[0], tuple(image[1:])
    else:
        values["image"] = image
    if "nutrition" in values:
        values["nutrition"] = _as_written("nutrition", values["nutrition"])
    return FoodRecord(**values)


def _as_written(key: str, value: Any) -> Any:
    if key in ("amount", "mass"):
        return float(value)
    if key != "nutrition":
        return value
    numbers = {name: float(value[name]) for name in NUTRITION_FIELDS if name in value}
    micro = value.get("micronutrients", {})
    if len(numbers) + ("micronutrients" in value) != len(value):
        raise ValueError(f"nutrition: unknown field in {_show(value)}")
    return Nutrition(
        **numbers,
        micronutrients={
            name: Quantity(float(entry["value"]), entry["unit"]) for name, entry in micro.items()
        },
    )


def _to_json(value: Any) -> Any:
    if hasattr(value, "__dataclass_fields__"):
        entries = ((f.name, getattr(value, f.name)) for f in fields(value))
        # not by truth: 0 is known, and an empty Nutrition is not None
        unknown: tuple[object, ...] = (None, (), {})
        return {name: _to_json(entry) for name, entry in entries if entry not in unknown}
    if isinstance(value, Mapping):
        return {key: _to_json(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_to_json(entry) for entry in value]
    # 320.0 is written as 320: shorter, and equal when read back
    return int(value) if isinstance(value, float) and value.is_integer() else value


def record_to_json(record: FoodRecord) -> dict[str, Any]:
    """The record as a JSON-able dict, unknown fields left out; `record_from_json` undoes it."""
    obj: dict[str, Any] = _to_json(record)
    if record.more_images:
        obj["image"] = list(record.images)
        del obj["more_images"]
    elif not record.image:
        del obj["image"]
    return obj


def _reject_constant(name: str) -> float:
    raise RecordError(f"{name} is not a JSON number")


def read_records(path: str | os.PathLike[str], *, split: str | None = None) -> Iterator[FoodRecord]:
    """Reads a JSONL file record by record; never holds more than one (and the ids seen).

    Args:
        path: the file, UTF-8, gzip'ed or not. Empty lines are skipped.
        split: only records of this split; every line is checked all the same.

    Raises:
        RecordError: `file.jsonl:12: ingredients[2].amount: expected a number, got "two"`. Also for an id
            that stands twice, and for a record without a split where `split` is asked for.
    """
    if split is not None and split not in SPLITS:
        raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
    path = Path(path)
    folder = path.resolve().parent
    first_line: dict[str, int] = {}
    with open_data(path) as lines:
        for number, raw in enumerate(lines, start=1):
            try:
                record = record_of_line(raw, first=number == 1)
                if record is None:
                    continue
                if record.id in first_line:
                    raise RecordError(f"id: {record.id!r} stands on line {first_line[record.id]} already")
                first_line[record.id] = number
                if split is not None and record.split is None:
                    raise RecordError(f"split: missing, but split {split!r} was asked for")
            except RecordError as error:
                raise RecordError(f"{path}:{number}: {error}") from None
            if split is None or record.split == split:
                yield with_folder(record, folder)


def record_of_line(raw: bytes, *, first: bool = False) -> FoodRecord | None:
    """The record of a line of a file, its images as they are written; None for an empty line.

    Args:
        raw: the line, with its end or without.
        first: it is the file's first, which may begin with a byte-order mark, as some editors write it.

    Raises:
        RecordError: it is not UTF-8, not JSON, or does not fit the schema.
    """
    try:
        line = raw.decode("utf-8-sig" if first else "utf-8").strip()
        return record_from_json(json.loads(line, parse_constant=_reject_constant)) if line else None
    except UnicodeDecodeError as error:
        raise RecordError(f"not UTF-8: {error.reason}") from None
    except json.JSONDecodeError as error:
        raise RecordError(f"not JSON: {error.msg} at column {error.colno}") from None


_UNUSUAL = re.compile(r"//|(?:^|/)\.(?:/|$)|/$")
"""Paths that pathlib writes in another way."""


def with_folder(record: FoodRecord, folder: Path) -> FoodRecord:
    """The record with the absolute paths of images that are written relative to its file's folder."""
    if not record.image:
        return record
    if os.sep == "/" and not any(map(_UNUSUAL.search, record.images)):
        paths = [
            os.path.join(folder, image) for image in record.images
        ]  # what Path would say, in a fifth of its time
    else:
        paths = [str(folder / image) for image in record.images]
    return with_images(record, paths)  # an absolute one stays as it is


def write_records(path: str | os.PathLike[str], records: Iterable[FoodRecord]) -> int:
    """Writes records as JSONL, aside and then renamed, so that a reader never sees half a file.

    An absolute image path inside the file's folder is written relative to it, so that the folder can be
    moved; a relative one is taken as relative to the file's folder already.

    Returns:
        How many records were written.

    Raises:
        RecordError: for a record that `read_records` would refuse; the file is left as it was.
    """
    path = Path(path)
    folder = path.resolve().parent
    seen: set[str] = set()
    with replacing(path) as out:
        for record in records:
            record = with_images(record, (_within(image, folder) for image in record.images))
            out.write(record_line(record, seen) + "\n")
    return len(seen)


def _within(image: str, folder: Path) -> str:
    path = Path(image)
    inside = path.is_absolute() and path.is_relative_to(folder)
    return path.relative_to(folder).as_posix() if inside else image


def record_line(record: FoodRecord, seen: set[str]) -> str:
    """A record's line of a file, without its end; its id is added to those `seen` in the file.

    Raises:
        RecordError: for a record that `read_records` would refuse, naming it.
    """
    obj = record_to_json(record)
    try:
        record_from_json(obj)
        if record.id in seen:
            raise RecordError("id: stands twice")
    except RecordError as error:
        raise RecordError(f"record {record.id!r}: {error}") from None
    seen.add(record.id)
    return json.dumps(obj, ensure_ascii=False)
