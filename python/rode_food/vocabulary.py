"""The vocabulary of ingredients: which names mean one thing, and which are common enough to be asked for.

After the protocol of InverseCooking (Salvador et al., CVPR 2019; `src/build_vocab.py` of facebookresearch/inversecooking), which
came to 1,488 ingredients of Recipe1M.

As there:
- Only training records count, those within `Limits`, and each mention once.
- Names are lower-cased, freed of digits and punctuation and joined by `_`; "&" is read as "and".
- A name is merged into its last word, else its first, its last two, its first two: the first of these that is itself a name of
  the training split. Where that is two words of which one is such a name, it goes into that one.
- Of what these merges leave, a name in "es" or "s" is merged into the one without the ending.
- What is then mentioned `min_count` times or more is kept.
- A name is looked up, not taken apart: one that the training split lacks is unknown, however like a known one.

Otherwise than there, and why:
- All punctuation is stripped, where InverseCooking has a list of eight marks: names with brackets or quotes would stand alone.
- No words are added to those that names can be merged into. InverseCooking's list was made by hand for Recipe1M, spelling errors
  included; here the vocabulary follows from the records alone.
- Plurals are followed to their end; there, what becomes of "glasses" where "glas" is a name as well depends on the records' order.
- Steps that begin with a digit count towards `Limits`: readers have taken the numbering off, so it is a quantity or a time.
- `Limits` choose what is counted, not what is evaluated.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rode_food.atomic import replacing
from rode_food.names import ingredient_key
from rode_food.records import FoodRecord, RecordError
from rode_food.tasks import answer_name

VERSION = 1


class VocabularyError(ValueError):
    """A vocabulary that cannot be built or read. One line."""


@dataclass(frozen=True)
class Limits:
    """The limits of training records that are counted; both ends included.

    Attributes:
        ingredients: how many, repeated ones too.
        instructions: how many steps.
        characters: the fewest of all steps together.
    """

    ingredients: tuple[int, int] = (2, 19)
    instructions: tuple[int, int] = (2, 19)
    characters: int = 20

    def allow(self, record: FoodRecord, names: int) -> bool:
        """Whether a record with so many `names` lies within them."""
        steps = [step.strip() for step in record.instructions]
        return (
            self.ingredients[0] <= names <= self.ingredients[1]
            and self.instructions[0] <= len(steps) <= self.instructions[1]
            and sum(map(len, steps)) >= self.characters
        )


@dataclass
class NameCounts:
    """How often each name stands in records: all that a vocabulary is made from. One entry a distinct name.

    Attributes:
        counted: name -> mentions in the training records within the limits.
        by_split: split -> name -> mentions in all of its records.
        records: split -> records. within: training records within the limits.
    """

    counted: Counter[str] = field(default_factory=Counter)
    by_split: dict[str, Counter[str]] = field(default_factory=dict)
    records: Counter[str] = field(default_factory=Counter)
    within: int = 0


def count_names(records: Iterable[FoodRecord], limits: Limits | None = Limits()) -> NameCounts:
    """Counts names in one pass over any number of records.

    Args:
        limits: None counts every training record, for sources without instructions.

    Raises:
        RecordError: for a record without a split.
    """
    counts = NameCounts()
    for record in records:
        if record.split is None:
            raise RecordError(
                f"record {record.id!r}: split: missing; a vocabulary counts the training split alone, so each record needs one"
            )
        # as answers write them, for it is answers and their truths that are looked up
        names = [key for i in record.ingredients if (key := ingredient_key(answer_name(i.name)))]
        counts.records[record.split] += 1
        counts.by_split.setdefault(record.split, Counter()).update(names)
        if record.split == "train" and (limits is None or limits.allow(record, len(names))):
            counts.within += 1
            counts.counted.update(names)
    return counts


def merge_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> the one among the names that it is merged into; a function of the set alone, not of its order."""
    known = frozenset(names)
    clusters = {name: _cluster(name, known) for name in known}
    heads = frozenset(clusters.values())
    return {name: _singular(head, heads) for name, head in clusters.items()}


def _cluster(name: str, known: frozenset[str]) -> str:
    words = name.split("_")
    wider = ["_".join(words[-2:]), "_".join(words[:2])] if len(words) > 1 else []
    for found in (words[-1], words[0], *wider):
        if found in known:
            return next((word for word in found.split("_") if word in known), found)
    return name


def _singular(name: str, heads: frozenset[str]) -> str:
    while True:
        shorter = [name[: -len(end)] for end in ("es", "s") if name.endswith(end)]
        found = next((candidate for candidate in shorter if candidate in heads), None)
        if found is None:
            return name
        name = found


@dataclass(frozen=True)
class Vocabulary:
    """Canonical names with the variants that mean the same.

    Attributes:
        variants: canonical name -> {variant, itself among them: mentions in the counted records}; the most mentioned first,
            ties by name.
        min_count: the fewest mentions of a canonical name, its variants included.
        limits: of the records that were counted; None for all training records.
        records: how many were counted.
    """

    variants: Mapping[str, Mapping[str, int]]
    min_count: int = 10
    limits: Limits | None = None
    records: int = 0

    def __post_init__(self) -> None:
        _ = self.canonical  # checks

    @functools.cached_property
    def canonical(self) -> dict[str, str]:
        """Variant -> canonical name. Raises VocabularyError where that is no function, or a canonical name not its own variant."""
        canonical: dict[str, str] = {}
        for name, variants in self.variants.items():
            if name not in variants:
                raise VocabularyError(f"{name!r}: expected it among its own variants")
            for variant in variants:
                if canonical.setdefault(variant, name) != name:
                    raise VocabularyError(f"{variant!r}: a variant of {canonical[variant]!r} and of {name!r}")
        return canonical

    @classmethod
    def from_counts(
        cls,
        counts: NameCounts,
        *,
        min_count: int = 10,
        limits: Limits | None = Limits(),
    ) -> Vocabulary:
        """The vocabulary of names that were counted within `limits`.

        Raises:
            VocabularyError: if `min_count` is below 1, or nothing is left.
        """
        if min_count < 1:
            raise VocabularyError(f"min_count: expected at least 1, got {min_count}")
        if not counts.within:
            raise VocabularyError(_nothing_within(counts, limits))
        merged: dict[str, dict[str, int]] = {}
        for name, head in merge_names(counts.counted).items():
            merged.setdefault(head, {})[name] = counts.counted[name]
        kept = {name: v for name, v in merged.items() if sum(v.values()) >= min_count}
        if not kept:
            raise VocabularyError(
                f"no ingredient was named {min_count} times in {counts.within} training records; choose a smaller min_count"
            )
        ordered = {
            name: dict(sorted(kept[name].items(), key=lambda item: (-item[1], item[0])))
            for name in sorted(kept, key=lambda name: (-sum(kept[name].values()), name))
        }
        return cls(ordered, min_count, limits, counts.within)

    @classmethod
    def build(
        cls,
        records: Iterable[FoodRecord],
        *,
        min_count: int = 10,
        limits: Limits | None = Limits(),
    ) -> Vocabulary:
        """Counts records, those of the training split alone, and merges; memory grows with distinct names only.

        Args:
            records: with splits, in any order: it changes nothing.
            min_count: the fewest mentions of a name and its variants.
            limits: None counts every training record.

        Raises:
            RecordError: for a record without a split. VocabularyError: see `from_counts`.
        """
        return cls.from_counts(count_names(records, limits), min_count=min_count, limits=limits)

    def __len__(self) -> int:
        return len(self.variants)

    @property
    def counts(self) -> dict[str, int]:
        """Canonical name -> mentions, its variants' included."""
        return {name: sum(variants.values()) for name, variants in self.variants.items()}

    @property
    def name(self) -> str:
        """Size and a hash of what is merged into what, to print beside a metric: "1488 ingredients, sha256 0f3a9c21b7d4"."""
        pairs = sorted(self.canonical.items())
        digest = hashlib.sha256(json.dumps(pairs, ensure_ascii=False).encode()).hexdigest()
        return f"{len(self)} ingredients, sha256 {digest[:12]}"

    def normalise(self, name: str) -> str | None:
        """The canonical name of an ingredient; None for one that no counted record names.

        Names are looked up, as InverseCooking does: a longer name that the training split lacks is not taken apart.
        """
        return self.canonical.get(ingredient_key(name))

    def normalise_set(self, names: Iterable[str]) -> tuple[str, ...]:
        """The canonical names of those that are known, each once, in their order."""
        found = (self.normalise(name) for name in names)
        return tuple(dict.fromkeys(name for name in found if name is not None))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, aside and then renamed; the same vocabulary gives the same bytes."""
        counts = self.counts
        value = {
            "version": VERSION,
            "min_count": self.min_count,
            "limits": None if self.limits is None else asdict(self.limits),
            "records": self.records,
            "ingredients": {
                name: {"count": counts[name], "variants": dict(variants)}
                for name, variants in self.variants.items()
            },
        }
        with replacing(path) as out:
            json.dump(value, out, ensure_ascii=False, indent=1)
            out.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocabulary:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            VocabularyError: it holds no vocabulary, or one of another version; names the file and what is wrong.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such vocabulary; `rode data vocabulary` builds one")
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise VocabularyError(f"{path}: not JSON: {error}") from None
        try:
            return _from_json(value)
        except VocabularyError as error:
            raise VocabularyError(f"{path}: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            raise VocabularyError(
                f"{path}: not a vocabulary of `rode data vocabulary`: {type(error).__name__}: {error}"
            ) from None


def _from_json(value: object) -> Vocabulary:
    if not isinstance(value, dict) or "version" not in value:
        raise VocabularyError("not a vocabulary of `rode data vocabulary`: no version in it")
    if value["version"] != VERSION:
        raise VocabularyError(f"version: expected {VERSION}, got {value['version']!r}; build it anew")
    variants: dict[str, dict[str, int]] = {}
    for name, entry in value["ingredients"].items():
        variants[name] = dict(entry["variants"])
        for variant, count in variants[name].items():
            if ingredient_key(variant) != variant:
                raise VocabularyError(
                    f"ingredients.{name}: {variant!r} is no normalised name; build the vocabulary anew"
                )
            if type(count) is not int or count < 1:
                raise VocabularyError(f"ingredients.{name}.{variant}: expected a count from 1, got {count!r}")
        if sum(variants[name].values()) != entry["count"]:
            raise VocabularyError(f"ingredients.{name}: its variants' counts do not sum to {entry['count']}")
    limits = value["limits"]
    if limits is not None:
        limits = Limits(tuple(limits["ingredients"]), tuple(limits["instructions"]), limits["characters"])
    return Vocabulary(variants, value["min_count"], limits, value["records"])


def _nothing_within(counts: NameCounts, limits: Limits | None) -> str:
    train = counts.records["train"]
    if not train:
        seen = ", ".join(f"{n} {split}" for split, n in counts.records.items()) or "none"
        return f"no training record: a vocabulary counts split train alone; the records are: {seen}"
    assert limits is not None  # without limits every training record is within them
    least, most = limits.instructions
    return (
        f"none of {train} training records has {limits.ingredients[0]} to {limits.ingredients[1]} ingredients, {least} to {most} "
        f"instructions and {limits.characters} characters of them; without limits (--all-records) every one is counted"
    )


@dataclass(frozen=True)
class Coverage:
    """How much of a split's names a vocabulary knows; shares from 0 to 1, None where there are no names."""

    records: int
    mentions: int
    mentions_known: float | None
    names: int
    names_known: float | None


def coverage(vocabulary: Vocabulary, counts: NameCounts) -> dict[str, Coverage]:
    """Coverage by split, in the order train, val, test: of the mentions, and of the distinct names."""
    out = {}
    for split in ("train", "val", "test"):
        if split not in counts.records:
            continue
        names = counts.by_split.get(split, Counter())
        known = [name for name in names if vocabulary.normalise(name) is not None]
        mentions = sum(names.values())
        out[split] = Coverage(
            records=counts.records[split],
            mentions=mentions,
            mentions_known=sum(names[name] for name in known) / mentions if mentions else None,
            names=len(names),
            names_known=len(known) / len(names) if names else None,
        )
    return out
