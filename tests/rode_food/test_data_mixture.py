from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from rode_food.data_mixture import DataMixture, load_examples
from rode_food.records import FoodRecord, RecordError, write_records
from rode_food.source import Source, hash_split, within_fraction

FRACTIONS = {"train": 0.5, "val": 0.2, "test": 0.3}


def file_of(path: Path, count: int, *, split: str | None = "train", category: str | None = "soup") -> str:
    name = path.stem
    write_records(
        path, [FoodRecord(f"{name}{i}", "a.jpg", name, category=category, split=split) for i in range(count)]
    )
    return str(path)


def test_hash_split_keeps_to_the_fractions_and_never_moves() -> None:
    ids = [f"dish_{i}" for i in range(20000)]
    first = [hash_split(id, FRACTIONS) for id in ids]
    shares = Counter(first)
    for split, share in FRACTIONS.items():
        # 4 standard deviations of a binomial
        assert abs(shares[split] / len(ids) - share) < 4 * (share * (1 - share) / len(ids)) ** 0.5
    assert [hash_split(id, FRACTIONS, seed=1) for id in ids] != first
    # known values: the split must be the same on another machine
    assert first[:8] == ["test", "test", "val", "train", "train", "train", "test", "test"]
    assert {hash_split(id, {"test": 1.0}) for id in ids[:100]} == {"test"}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ({"train": 0.5, "dev": 0.5}, "expected some of train, val, test, got 'dev'"),
        ({"train": 0.5}, "expected a sum of 1, got 0.5"),
        ({"train": 1.5, "test": -0.5}, "train: expected 0 to 1, got 1.5"),
        ({}, "expected a sum of 1, got 0"),
    ],
)
def test_bad_fractions(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"split fractions: {message}"):
        hash_split("a", fractions)


@pytest.mark.parametrize(
    ("weights", "epochs"), [((1.0, 1.0), 2), ((0.25, 2.0), 4), ((0.3, 1.7), 10), ((3.0, 0.1), 10)]
)
def test_over_epochs_every_example_comes_up_as_often_as_its_weight_says(weights: tuple, epochs: int) -> None:
    mixture = DataMixture([None] * 30, [20, 10], list(weights), seed=3)  # type: ignore[list-item]
    plans = [mixture.plan(epoch) for epoch in range(epochs)]
    for plan in plans:
        assert len(plan) == len(mixture) == round(weights[0] * 20) + round(weights[1] * 10)
    counts = Counter(index for plan in plans for index in plan)
    for index in range(30):
        assert counts[index] == pytest.approx(epochs * weights[0 if index < 20 else 1])


def test_within_an_epoch_no_example_comes_up_twice_more_than_another() -> None:
    mixture = DataMixture([None] * 7, [7], [1.5], seed=0)  # type: ignore[list-item]
    for epoch in range(6):
        # 10 or 11 draws cross one or two passes: each example is drawn at most once in each
        counts = Counter(mixture.plan(epoch))
        assert max(counts.values()) <= 3
    total = Counter(i for epoch in range(6) for i in mixture.plan(epoch))
    assert max(total.values()) - min(total.values()) <= 1


def test_the_plan_is_a_function_of_seed_and_epoch() -> None:
    def mixture(seed: int) -> DataMixture:
        return DataMixture([None] * 50, [30, 20], [1.0, 0.5], seed)  # type: ignore[list-item]

    assert mixture(0).plan(5) == mixture(0).plan(5)
    assert mixture(0).plan(0) != mixture(0).plan(1)
    assert mixture(0).plan(0) != mixture(1).plan(0)
    # sources are mixed, not one after the other
    assert mixture(0).plan(0) != sorted(mixture(0).plan(0), key=lambda index: index >= 30)


def test_load_examples(tmp_path: Path) -> None:
    a, b = file_of(tmp_path / "a.jsonl", 4), file_of(tmp_path / "b.jsonl", 6)
    mixture = load_examples(
        [Source(a), Source(b, name="other", weight=0.5), Source("absent", weight=0)], "train"
    )
    assert Counter(example.source for example in mixture.examples) == {"a": 4, "other": 6}
    assert (mixture.counts, mixture.weights, len(mixture)) == ([4, 6], [1.0, 0.5], 7)
    assert all(Path(example.image) == tmp_path / "a.jpg" for example in mixture.examples)
    one = load_examples([Source(a)], "train", wording="random", seed=1)
    two = load_examples([Source(a)], "train", wording="random", seed=2)
    assert [e.question for e in one.examples] != [e.question for e in two.examples]


def test_records_without_a_split(tmp_path: Path) -> None:
    path = file_of(tmp_path / "a.jsonl", 40, split=None)
    with pytest.raises(
        RecordError, match="record 'a0' has no split; write one, or give the source split_fractions"
    ):
        load_examples([Source(path)], "train")
    source = Source(path, split_fractions=FRACTIONS)
    parts = {split: load_examples([source], split, seed=9).examples for split in FRACTIONS}
    ids = [example.record_id for part in parts.values() for example in part]
    assert sorted(ids) == sorted(f"a{i}" for i in range(40))
    for split, part in parts.items():
        assert all(e.split == split == hash_split(e.record_id, FRACTIONS) for e in part)


def test_a_smaller_fraction_is_part_of_a_larger_one(tmp_path: Path) -> None:
    ids = [f"dish_{i}" for i in range(8000)]
    kept = {f: [id for id in ids if within_fraction(id, f)] for f in (1 / 8, 1 / 4, 1 / 2, 1.0)}
    assert kept[1.0] == ids
    for small, large in ((1 / 8, 1 / 4), (1 / 4, 1 / 2)):
        assert set(kept[small]) < set(kept[large])
        # 4 standard deviations of a binomial
        assert abs(len(kept[small]) / len(ids) - small) < 4 * (small * (1 - small) / len(ids)) ** 0.5
    # known values: the part must be the same on another machine
    assert kept[1 / 8][:4] == ["dish_9", "dish_31", "dish_38", "dish_44"]
    # which part is used says nothing about the split that a hash makes
    train = [hash_split(id, FRACTIONS) == "train" for id in kept[1 / 4]]
    assert abs(sum(train) / len(train) - 0.5) < 4 * (0.25 / len(train)) ** 0.5
    path = file_of(tmp_path / "dish_.jsonl", 64)
    source = Source(path, tasks=("category",), fraction=0.25)
    used = [example.record_id for example in load_examples([source], "train").examples]
    assert used == [id for id in ids[:64] if id in kept[1 / 4]]
    held_out = Source(file_of(tmp_path / "b.jsonl", 64, split="test"), fraction=0.25)
    assert len(load_examples([held_out], "test").examples) == 64
    few = Source(file_of(tmp_path / "c.jsonl", 1), fraction=1e-9)
    with pytest.raises(
        ValueError, match=r"category.* in a fraction of 1e-09; give it a larger fraction, weight 0"
    ):
        load_examples([few], "train")


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    full, empty = file_of(tmp_path / "a.jsonl", 3), file_of(tmp_path / "b.jsonl", 3, category=None)
    with pytest.raises(
        ValueError, match=r"b\.jsonl: no example of split 'train' for category, recipe; give it weight 0"
    ):
        load_examples([Source(full), Source(empty, tasks=("category", "recipe"))], "train")
    with pytest.raises(ValueError, match=r"no example of split 'test' in .*a\.jsonl"):
        load_examples([Source(full)], "test")
    with pytest.raises(ValueError, match="no example of split 'test' in no sources"):
        load_examples([], "test")
    with pytest.raises(ValueError, match="split: expected one of train, val, test, got 'dev'"):
        load_examples([Source(full)], "dev")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight of a.jsonl: expected a finite number >= 0, got -1.0"),
        ({"weight": float("nan")}, "weight of a.jsonl: expected a finite number >= 0, got nan"),
        ({"fraction": 0.0}, "fraction of a.jsonl: expected more than 0 and at most 1, got 0.0"),
        ({"fraction": 1.5}, "fraction of a.jsonl: expected more than 0 and at most 1, got 1.5"),
        ({"fraction": float("nan")}, "fraction of a.jsonl: expected more than 0 and at most 1, got nan"),
        ({"tasks": ("cook",)}, "tasks of a.jsonl: expected some of .*, got 'cook'"),
        ({"name": "all"}, 'name: "all" stands for all sources'),
        ({"split_fractions": {"train": 0.4}}, "expected a sum of 1, got 0.4"),
    ],
)
def test_bad_sources(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Source("a.jsonl", **options)
