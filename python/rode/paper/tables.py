"""What the paper printed and which runs each table and figure wants: `configs/paper/tables.yaml`, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rode.training.config import RecipeError, recipe_values
from rode_food.settings import build, did_you_mean

FILE = "tables.yaml"


@dataclass(frozen=True)
class Metric:
    """How one of `rode_food.metrics.score`'s metrics is shown."""

    heading: str
    better: Literal["more", "less"]


@dataclass(frozen=True)
class Variant:
    """One adapter of the paper; its recipe is the file of its name."""

    label: str
    ranks: str
    router: str


@dataclass(frozen=True)
class Adapted:
    """The adapted layers of the paper's model, from which parameters are counted: it plots them, but prints none."""

    layers: int
    in_features: int
    out_features: int

    def parameters(self, variant: Variant) -> int:
        """Trained by a variant: A and B of each expert, and the router where there is one."""
        ranks = [int(rank) for rank in variant.ranks.split(",")]
        router = 0 if variant.router == "none" else len(ranks) * self.in_features
        return self.layers * (sum(ranks) * (self.in_features + self.out_features) + router)


@dataclass(frozen=True)
class Data:
    """What the runs of a table learn from.

    Attributes:
        base: the recipe that its variants extend, relative to the file.
        adapted: of the paper's model.
        paper: variant -> metric -> the number printed.
    """

    base: str
    adapted: Adapted
    paper: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Item:
    """A table or figure: rows and columns by name."""

    title: str
    data: str
    variants: list[str]
    metrics: list[str]
    named_by: list[Literal["label", "ranks", "router"]]
    kind: Literal["table", "heat_map", "bars", "parameters"] = "table"


@dataclass(frozen=True)
class Tables:
    """All of the file."""

    metrics: dict[str, Metric]
    variants: dict[str, Variant]
    data: dict[str, Data]
    items: dict[str, Item]
    folder: Path = Path()

    def item(self, name: str) -> Item:
        _known([name], self.items, f"{self.folder / FILE}: table or figure")
        return self.items[name]

    def base(self, item: Item) -> Path:
        """The recipe below the item's variants."""
        return self.folder / self.data[item.data].base

    def recipe(self, variant: str) -> Path:
        return self.folder / f"{variant}.yaml"

    def name(self, item: Item, variant: str) -> str:
        """A variant as the item's rows name it."""
        return " ".join(getattr(self.variants[variant], part) for part in item.named_by)


def _known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in names:
        if name not in set(known):
            raise RecipeError(f"{what} {name!r}: no such one; {did_you_mean(name, known)}")


def read_tables(folder: Path) -> Tables:
    """`tables.yaml` of a folder of variants.

    Raises:
        FileNotFoundError: there is none.
        RecipeError: unknown keys or names, wrong types, a variant without a recipe.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; --recipes names the folder that holds it (configs/paper of the repository)"
        )
    try:
        tables = dataclasses.replace(build(Tables, recipe_values(path)), folder=folder)
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    for name in tables.variants:
        if not tables.recipe(name).is_file():
            raise RecipeError(f"{path}: variants.{name}: expected its recipe in {tables.recipe(name)}")
    for name, data in tables.data.items():
        where = f"{path}: data.{name}.paper:"
        _known(data.paper, tables.variants, f"{where} variant")
        for numbers in data.paper.values():
            _known(numbers, tables.metrics, f"{where} metric")
    for name, item in tables.items.items():
        where = f"{path}: items.{name}:"
        _known([item.data], tables.data, f"{where} data")
        _known(item.variants, tables.variants, f"{where} variant")
        _known(item.metrics, tables.metrics, f"{where} metric")
    return tables
