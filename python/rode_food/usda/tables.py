"""USDA's tables in the layouts in which they are handed out, as one `FoodTable`.

SR28 (2016) as ASCII: https://www.ars.usda.gov/nutrientdata, "SR28 - Download Files", ASCII; its documentation
(sr28_doc.pdf) describes the files. FoodData Central as CSV: https://fdc.nal.usda.gov/download-datasets, "SR Legacy"
(the same foods as SR28, its last release), "Foundation Foods" or "Full Download of All Data Types". Public domain (CC0).
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

NUTRIENTS = ("energy", "fat", "protein", "carb")
"""What a food states per 100 g: kcal, g, g, g."""

_DOWNLOAD = (
    "download USDA's SR Legacy as CSV from https://fdc.nal.usda.gov/download-datasets and unpack it "
    "(or SR28 as ASCII from https://www.ars.usda.gov/nutrientdata)"
)
_SR_ASCII = ("FOOD_DES.txt", "FD_GROUP.txt", "NUT_DATA.txt", "WEIGHT.txt")
_FDC_CSV = ("food.csv", "food_nutrient.csv", "food_portion.csv", "measure_unit.csv")
_SR_CSV = ("sr28_foods.csv", "sr28_portions.csv")
# energy (kcal), fat, protein, carbohydrate by difference: "tagname" numbers of SR, ids of FoodData Central
_SR_NUTRIENTS = {"208": "energy", "204": "fat", "203": "protein", "205": "carb"}
_FDC_NUTRIENTS = {"1008": "energy", "1004": "fat", "1003": "protein", "1005": "carb"}
# Foundation foods state energy by Atwater factors instead: specific ones, else general ones
_FDC_OTHER_ENERGY = ("2048", "2047")


class UsdaError(ValueError):
    """Tables that are missing or cannot be read. One line: which file, what is wrong, what to do."""


@dataclass(frozen=True)
class Portion:
    """A household measure: `amount` of `measure` weigh `grams`, e.g. `Portion(1, "cup, chopped", 160)`."""

    amount: float
    measure: str
    grams: float


@dataclass(frozen=True)
class Food:
    """One food of the table, per 100 g of its edible part.

    Attributes:
        id: the five digits of its NDB number, or `fdc:ID` where it has none.
        description: USDA's, e.g. "Butter, salted".
        group: USDA's food group.
        energy: kilocalories.
        fat, protein, carb: grams; `carb` is by difference, fibre included.
        portions: household measures in the table's order.
    """

    id: str
    description: str
    group: str
    energy: float
    fat: float
    protein: float
    carb: float
    portions: tuple[Portion, ...] = ()


@dataclass(frozen=True)
class FoodTable:
    """All foods by id, and `incomplete`: how many were left out for want of one of `NUTRIENTS`."""

    foods: Mapping[str, Food]
    incomplete: int = 0

    def __getitem__(self, id: str) -> Food:
        return self.foods[id]

    def __contains__(self, id: object) -> bool:
        return id in self.foods

    def __iter__(self) -> Iterator[Food]:
        return iter(self.foods.values())

    def __len__(self) -> int:
        return len(self.foods)


def load_foods(folder: str | os.PathLike[str]) -> FoodTable:
    """Reads the tables in `folder`, whichever of the layouts above it holds.

    Of FoodData Central, SR Legacy and Foundation foods are taken; a food that stands in both (by its NDB number) is
    SR Legacy's, which has more household measures. Two CSV files `sr28_foods.csv` and `sr28_portions.csv` (one row a
    food with ndb_no, description, food_group, kcal, fat_g, protein_g, carb_g; one row a measure with ndb_no, amount,
    measure, grams) are read as well.

    Raises:
        UsdaError: for a folder without tables, a file that is missing, or a row that cannot be read (file and line).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsdaError(f"USDA tables: {folder} is not a folder; {_DOWNLOAD}")
    for first, names, read in (
        ("sr28_foods.csv", _SR_CSV, _sr_csv),
        ("FOOD_DES.txt", _SR_ASCII, _sr_ascii),
        ("food.csv", _FDC_CSV, _fdc),
    ):
        if (folder / first).is_file():
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UsdaError(
                    f"USDA tables: {folder} has {first} but not {', '.join(missing)}; {_DOWNLOAD}"
                )
            table = read(folder)
            if not table:
                raise UsdaError(
                    f"USDA tables: {folder / first} holds no food with energy, fat, protein and carbohydrate"
                )
            return table
    raise UsdaError(
        f"USDA tables: {folder} has neither food.csv, FOOD_DES.txt nor sr28_foods.csv; {_DOWNLOAD}"
    )


@dataclass
class _Building:
    description: str
    group: str
    values: dict[str, float] = field(default_factory=dict)
    portions: list[tuple[float, Portion]] = field(default_factory=list)


def _table(building: Mapping[str, _Building]) -> FoodTable:
    foods = {
        id: Food(
            id=id,
            description=b.description,
            group=b.group,
            portions=tuple(p for _, p in sorted(b.portions, key=lambda entry: entry[0])),
            **{name: b.values[name] for name in NUTRIENTS},
        )
        for id, b in building.items()
        if all(name in b.values for name in NUTRIENTS)
    }
    return FoodTable(foods, len(building) - len(foods))


def _rows(path: Path, needed: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV file with a header that has the columns `needed`."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            missing = [name for name in needed if name not in (reader.fieldnames or ())]
            if missing:
                raise UsdaError(f"{path}:1: no column {', '.join(missing)}; {_DOWNLOAD}")
            for row in reader:
                if None in row.values():  # fewer cells than the header
                    raise UsdaError(f"{path}:{reader.line_num}: cut short")
                yield reader.line_num, row
    except UnicodeDecodeError as error:
        raise UsdaError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None
    except csv.Error as error:
        raise UsdaError(f"{path}: not CSV: {error}") from None


def _number(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise UsdaError(f"{path}:{line}: expected a number >= 0, got {text!r}")
    return value


def _add_portion(
    b: _Building, order: float, amount: str, measure: str, grams: str, path: Path, line: int
) -> None:
    # an amount left out is one: "1 medium" is often written without it in FoodData Central
    count = _number(amount, path, line) if amount else 1.0
    weight = _number(grams, path, line)
    if count > 0 and weight > 0 and measure:
        b.portions.append((order, Portion(count, measure, weight)))


def _sr_csv(folder: Path) -> FoodTable:
    columns = {"kcal": "energy", "fat_g": "fat", "protein_g": "protein", "carb_g": "carb"}
    foods: dict[str, _Building] = {}
    path = folder / "sr28_foods.csv"
    for line, row in _rows(path, ("ndb_no", "description", "food_group", *columns)):
        values = {name: _number(row[c], path, line) for c, name in columns.items() if row[c]}
        foods[row["ndb_no"].zfill(5)] = _Building(row["description"], row["food_group"], values)
    path = folder / "sr28_portions.csv"
    for line, row in _rows(path, ("ndb_no", "amount", "measure", "grams")):
        if (food := foods.get(row["ndb_no"].zfill(5))) is not None:
            _add_portion(food, line, row["amount"], row["measure"], row["grams"], path, line)
    return _table(foods)


def _sr_rows(path: Path, columns: int) -> Iterator[tuple[int, list[str]]]:
    """Fields of an SR file: text in tildes, fields between carets, ISO 8859-1."""
    with path.open(encoding="latin-1", newline="") as lines:
        for number, text in enumerate(lines, start=1):
            if text.strip():
                fields = [part.strip("~ ") for part in text.rstrip("\r\n").split("^")]
                if len(fields) < columns:
                    raise UsdaError(f"{path}:{number}: expected {columns} fields or more, got {len(fields)}")
                yield number, fields


def _sr_ascii(folder: Path) -> FoodTable:
    groups = {f[0]: f[1] for _, f in _sr_rows(folder / "FD_GROUP.txt", 2)}
    foods = {
        f[0].zfill(5): _Building(f[2], groups.get(f[1], f[1]))
        for _, f in _sr_rows(folder / "FOOD_DES.txt", 3)
    }
    path = folder / "NUT_DATA.txt"
    for line, f in _sr_rows(path, 3):
        if f[1] in _SR_NUTRIENTS and (food := foods.get(f[0].zfill(5))) is not None:
            food.values[_SR_NUTRIENTS[f[1]]] = _number(f[2], path, line)
    path = folder / "WEIGHT.txt"
    for line, f in _sr_rows(path, 5):
        if (food := foods.get(f[0].zfill(5))) is not None:
            _add_portion(food, line, f[2], f[3], f[4], path, line)
    return _table(foods)


def _ndb_numbers(folder: Path, name: str) -> dict[str, str]:
    """FDC id -> NDB number; nothing where the file is not there: not every download has both kinds of food."""
    path = folder / name
    if not path.is_file():
        return {}
    return {
        row["fdc_id"]: row["NDB_number"].zfill(5)
        for _, row in _rows(path, ("fdc_id", "NDB_number"))
        if row["NDB_number"]
    }


def _fdc(folder: Path) -> FoodTable:
    numbers = {
        "sr_legacy_food": _ndb_numbers(folder, "sr_legacy_food.csv"),
        "foundation_food": _ndb_numbers(folder, "foundation_food.csv"),
    }
    groups = {}
    if (folder / "food_category.csv").is_file():
        groups = {
            r["id"]: r["description"] for _, r in _rows(folder / "food_category.csv", ("id", "description"))
        }
    chosen: dict[str, tuple[tuple[bool, int], str]] = {}  # NDB number -> (rank, FDC id)
    foods: dict[str, _Building] = {}  # by FDC id
    path = folder / "food.csv"
    for line, row in _rows(path, ("fdc_id", "data_type", "description", "food_category_id")):
        if row["data_type"] not in numbers:
            continue
        fdc_id = row["fdc_id"]
        id = numbers[row["data_type"]].get(fdc_id, f"fdc:{fdc_id}")
        # SR Legacy first; of the versions of a Foundation food the latest
        rank = (row["data_type"] == "sr_legacy_food", int(_number(fdc_id, path, line)))
        if id in chosen and chosen[id][0] >= rank:
            continue
        if id in chosen:
            del foods[chosen[id][1]]
        chosen[id] = rank, fdc_id
        category = row["food_category_id"]
        foods[fdc_id] = _Building(row["description"], groups.get(category, category or "unknown"))
    _fdc_nutrients(folder / "food_nutrient.csv", foods)
    _fdc_portions(folder, foods)
    return _table({id: foods[fdc_id] for id, (_, fdc_id) in chosen.items()})


def _fdc_nutrients(path: Path, foods: Mapping[str, _Building]) -> None:
    other: dict[str, dict[str, float]] = {}
    for line, row in _rows(path, ("fdc_id", "nutrient_id", "amount")):
        food = foods.get(row["fdc_id"])
        if food is None or not row["amount"]:
            continue
        if row["nutrient_id"] in _FDC_NUTRIENTS:
            # carbohydrate by difference comes out slightly below 0 in some analyses of meat
            below = row["nutrient_id"] == "1005" and row["amount"].startswith("-")
            value = 0.0 if below else _number(row["amount"], path, line)
            food.values[_FDC_NUTRIENTS[row["nutrient_id"]]] = value
        elif row["nutrient_id"] in _FDC_OTHER_ENERGY:
            other.setdefault(row["fdc_id"], {})[row["nutrient_id"]] = _number(row["amount"], path, line)
    for fdc_id, energies in other.items():
        for nutrient in _FDC_OTHER_ENERGY:
            if nutrient in energies:
                foods[fdc_id].values.setdefault("energy", energies[nutrient])


def _fdc_portions(folder: Path, foods: Mapping[str, _Building]) -> None:
    units = {r["id"]: r["name"] for _, r in _rows(folder / "measure_unit.csv", ("id", "name"))}
    path = folder / "food_portion.csv"
    columns = (
        "fdc_id",
        "seq_num",
        "amount",
        "measure_unit_id",
        "portion_description",
        "modifier",
        "gram_weight",
    )
    for line, row in _rows(path, columns):
        food = foods.get(row["fdc_id"])
        if food is None or not row["gram_weight"]:
            continue
        unit = units.get(row["measure_unit_id"], "")
        unit = "" if unit == "undetermined" else unit  # SR Legacy states the whole measure as modifier
        words = (unit, row["portion_description"], row["modifier"])
        measure = ", ".join(word for word in words if word)
        order = float(row["seq_num"]) if row["seq_num"].isdigit() else line
        _add_portion(food, order, row["amount"], measure, row["gram_weight"], path, line)
