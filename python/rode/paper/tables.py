"""The runs that a table wants, and what the paper printed: `configs/paper/tables.yaml`, or a config of one's own, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rode.training import sweep
from rode.training.config import ConfigError, Experiment, experiment_values, load_experiment
from rode_food.settings import build, did_you_mean, read_mapping

FILE = "tables.yaml"


@dataclass(frozen=True)
class Metric:
    """How one of `rode_food.metrics.score`'s metrics is shown."""

    heading: str
    better: Literal["more", "less"]


METRICS = {
    "ingredient_iou": Metric("IoU", "more"),
    "sacrebleu": Metric("SacreBLEU", "more"),
    "rouge_l": Metric("ROUGE-L", "more"),
    "pmae_mass": Metric("pMAE mass", "less"),
    "pmae_energy": Metric("pMAE energy", "less"),
    "pmae_fat": Metric("pMAE fat", "less"),
    "pmae_protein": Metric("pMAE protein", "less"),
    "pmae_carb": Metric("pMAE carb", "less"),
    "pmae": Metric("pMAE", "less"),
    "category_accuracy": Metric("category", "more"),
}
OWN_METRICS = ("sacrebleu", "rouge_l", "ingredient_iou", "pmae", "category_accuracy")
"""Columns of a table that is not the paper's: one or two for each task."""


@dataclass(frozen=True)
class Variant:
    """One adapter of the paper; its config is the file of its name."""

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
    """The data that the runs of a table learn from.

    Attributes:
        base: the config that its variants extend, relative to the file.
        adapted: of the paper's model.
        paper: variant -> metric -> the number printed; empty for what the paper does not have.
    """

    base: str
    adapted: Adapted | None = None
    paper: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """Variants, and those that they are compared with; several on a side are averaged. `metrics`: None for all of the item's."""

    first: list[str]
    second: list[str]
    metrics: list[str] | None = None


@dataclass(frozen=True)
class Item:
    """A table or figure: rows and columns by name. `comparisons` are those of the kind of that name, by their titles. `differ`:
    keys of the config in which its variants are meant to differ, besides their adapters."""

    title: str
    data: str
    variants: list[str]
    metrics: list[str]
    named_by: list[Literal["label", "ranks", "router"]]
    kind: Literal["table", "heat_map", "bars", "parameters", "comparisons"] = "table"
    comparisons: dict[str, Comparison] = field(default_factory=dict)
    differ: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Tables:
    """All of the file.

    Attributes:
        folder: holds the variants' configs, each in a file of its name.
        file: holds all of them instead; swept: as variants of its sweep over these keys.
    """

    variants: dict[str, Variant]
    data: dict[str, Data]
    items: dict[str, Item]
    folder: Path = Path()
    file: Path | None = None
    swept: list[str] = field(default_factory=list)

    def item(self, name: str) -> Item:
        _known([name], self.items, f"{self.folder / FILE}: table or figure")
        return self.items[name]

    def base(self, item: Item) -> Path:
        """The config below the item's variants."""
        return self.folder / self.data[item.data].base

    def config_file(self, variant: str) -> Path:
        return self.file or self.folder / f"{variant}.yaml"

    def load(self, variant: str, overrides: Sequence[str], base: Path) -> Experiment:
        """A variant's config above `base`."""
        choice = [f"{sweep.KEY}={variant}"] if self.swept else []
        return load_experiment(self.config_file(variant), [*choice, *overrides], base=base)

    def name(self, item: Item, variant: str) -> str:
        """A variant as the item's rows name it."""
        return " ".join(getattr(self.variants[variant], part) for part in item.named_by) or variant


def _known(names: Iterable[str], known: Iterable[str], what: str) -> None:
    for name in names:
        if name not in set(known):
            raise ConfigError(f"{what} {name!r}: no such one; {did_you_mean(name, known)}")


def read_tables(folder: Path) -> Tables:
    """`tables.yaml` of a folder of variants.

    Raises:
        FileNotFoundError: there is none.
        ConfigError: unknown keys or names, wrong types, a variant without a config.
    """
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; --configs names the folder that holds it (configs/paper of the repository)"
        )
    try:
        tables = dataclasses.replace(build(Tables, experiment_values(path)), folder=folder)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    for name in tables.variants:
        if not tables.config_file(name).is_file():
            raise ConfigError(f"{path}: variants.{name}: expected its config in {tables.config_file(name)}")
    for name, data in tables.data.items():
        where = f"{path}: data.{name}.paper:"
        _known(data.paper, tables.variants, f"{where} variant")
        for numbers in data.paper.values():
            _known(numbers, METRICS, f"{where} metric")
    for name, item in tables.items.items():
        where = f"{path}: items.{name}:"
        _known([item.data], tables.data, f"{where} data")
        _known(item.variants, tables.variants, f"{where} variant")
        _known(item.metrics, METRICS, f"{where} metric")
        for title, comparison in item.comparisons.items():
            _known([*comparison.first, *comparison.second], item.variants, f"{where} comparisons.{title}:")
            _known(comparison.metrics or [], item.metrics, f"{where} comparisons.{title}.metrics:")
    return tables


def own_table(path: Path) -> Tables:
    """One table, named as the config in `path`: a row for each variant of its sweep, or for itself.

    Raises:
        FileNotFoundError; ConfigError: it extends no config, or its sweep is none.
    """
    values = experiment_values(path)
    base = read_mapping(path).get("extends")
    if base is None:
        raise ConfigError(
            f"{path}: extends: missing; results are kept by the name of the config that it extends"
        )
    try:
        variants = list(sweep.variants(values))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    name = str(values.get("name"))
    item = Item(f"Variants of {name}", "own", variants or [name], list(OWN_METRICS), [])
    return Tables({}, {"own": Data(base)}, {name: item}, path.parent, path, list(values.get(sweep.KEY, ())))
