"""The ingredient vocabulary: the protocol's steps by hand, and what must hold whatever the names."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food import FoodRecord, Ingredient, RecordError, write_records
from rode_food.commands import vocabulary as data_vocabulary
from rode_food.names import ingredient_key
from rode_food.readers import read_source
from rode_food.readers.log import ReadLog
from rode_food.source import hash_split
from rode_food.vocabulary import Limits, Vocabulary, VocabularyError, count_names, coverage, merge_names

STEPS = ("Boil it in water.", "Serve it hot.")
numbers = itertools.count()


def record(*names: str, split: str | None = "train", steps: tuple[str, ...] = STEPS) -> FoodRecord:
    return FoodRecord(
        id=f"r{next(numbers)}",
        image="/x.jpg",
        source="s",
        ingredients=tuple(map(Ingredient, names)),
        instructions=steps,
        split=split,
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("2% Milk", "milk"),
        ("salt & pepper", "salt_and_pepper"),
        ("mac 'n' cheese", "mac_and_cheese"),
        ("'nduja", "nduja"),
        ("Baker's  yeast (dry)", "bakers_yeast_dry"),
        ("red_pepper-flakes", "red_pepper_flakes"),
        ("ſtraße", "strasse"),
        ("100 %", ""),
    ],
)
def test_keys(name: str, key: str) -> None:
    assert ingredient_key(name) == key


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=12))
def test_a_key_is_its_own_key(name: str) -> None:
    key = ingredient_key(name)
    assert ingredient_key(key) == key
    assert not any(c.isspace() or c.isdecimal() for c in key)


def merged(*names: str) -> dict[str, str]:
    return {name: head for name, head in merge_names(names).items() if name != head}


def test_merging_by_hand() -> None:
    # last word before first; the first only where the last is no name
    assert merged("chicken_broth", "chicken", "broth") == {"chicken_broth": "broth"}
    assert merged("chicken_broth", "chicken") == {"chicken_broth": "chicken"}
    # last two before first two
    assert merged("low_sodium_soy_sauce", "soy_sauce", "low_sodium") == {"low_sodium_soy_sauce": "soy_sauce"}
    assert merged("soy_sauce_light", "soy_sauce") == {"soy_sauce_light": "soy_sauce"}
    # the middle word of three is met through the two around it; of two words that are a name, one is a name
    assert merged("fresh_basil_leaves", "basil_leaves", "basil") == {
        "fresh_basil_leaves": "basil",
        "basil_leaves": "basil",
    }
    assert merged("fresh_basil_leaves", "basil") == {}
    assert merged("fresh_basil_leaves", "fresh_basil", "basil") == {
        "fresh_basil_leaves": "basil",
        "fresh_basil": "basil",
    }
    # nothing in common
    assert merged("garam_masala", "curry_powder") == {}


def test_plurals_by_hand() -> None:
    assert merged("tomatoes", "tomato") == {"tomatoes": "tomato"}
    assert merged("eggs", "egg") == {"eggs": "egg"}
    assert merged("molasses") == {}
    # "es" before "s", where both leave a name; merging by words comes first
    assert merged("limes", "lime", "lim") == {"limes": "lim"}
    assert merged("red_onions", "onions", "onion") == {"red_onions": "onion", "onions": "onion"}
    assert merged("green_onions", "green_onion") == {"green_onions": "green_onion"}
    # a chain is followed to its end in every order
    for names in itertools.permutations(("glasses", "glass", "glas")):
        assert merged(*names) == {"glasses": "glas", "glass": "glas"}
    # the singular that has itself been merged elsewhere is none: "soup" goes with it
    assert merged("tomato_soups", "tomato_soup", "soup") == {"tomato_soup": "soup"}


def test_counts_by_hand() -> None:
    records = [
        record("Eggs", "salt"),
        record("egg", "sea salt", "salt"),
        record("egg", "sea salt", "saffron"),
        record("eggs", "truffle oil", split="test"),
    ]
    vocabulary = Vocabulary.build(records, min_count=3)
    assert vocabulary.variants == {"salt": {"salt": 2, "sea_salt": 2}, "egg": {"egg": 2, "eggs": 1}}
    assert list(vocabulary.variants) == ["salt", "egg"]
    assert vocabulary.counts == {"salt": 4, "egg": 3}
    assert (len(vocabulary), vocabulary.records, vocabulary.min_count) == (2, 3, 3)
    assert vocabulary.normalise("2 EGGS") == "egg"
    assert vocabulary.normalise("sea-salt") == "salt"
    assert vocabulary.normalise("saffron") is None
    assert (
        vocabulary.normalise("rock salt") is None
    )  # its last word is known, but no training record names it
    assert vocabulary.normalise_set(["Sea salt", "saffron", "eggs", "salt", "egg"]) == ("salt", "egg")
    assert list(Vocabulary.build(records, min_count=1).variants) == ["salt", "egg", "saffron"]
    # ties by name
    assert list(Vocabulary.build([record("b", "a")], min_count=1).variants) == ["a", "b"]


def test_names_are_counted_as_answers_write_them() -> None:
    vocabulary = Vocabulary.build([record("and salt, fine", "2. milk")], min_count=1)
    assert list(vocabulary.variants) == ["milk", "salt_fine"]


def test_limits_by_hand() -> None:
    limits = Limits()
    kept = record(*"ab")
    assert limits.allow(kept, 2)
    for names in (0, 1, 20):
        assert not limits.allow(kept, names)
    assert limits.allow(kept, 19)

    def allowed(*steps: str) -> bool:
        return limits.allow(record("a", "b", steps=steps), 2)

    assert not allowed("Boil it all in a lot of water.")
    assert allowed("0123456789", "0123456789")
    assert not allowed("0123456789", "012345678 ")
    assert allowed(*["Stir it."] * 19)
    assert not allowed(*["Stir it."] * 20)
    # repeated names count towards them, as they do for the protocol
    records = [record("a", "A"), record("b"), record("c", "d", steps=("Eat.",)), record(*map(str, range(9)))]
    counts = count_names(records)
    assert (counts.counted, counts.within, counts.records) == (Counter(a=2), 1, Counter(train=4))
    assert counts.by_split == {"train": Counter(a=2, b=1, c=1, d=1)}
    everything = count_names(records, None)
    assert (everything.counted, everything.within) == (Counter(a=2, b=1, c=1, d=1), 4)


def test_coverage_by_hand() -> None:
    records = [
        *[record("egg", "salt")] * 2,
        record("egg", "saffron"),
        record("eggs", "salt", "salt", "yuzu", split="test"),
        record(split="val"),
    ]
    counts = count_names(records)
    known = coverage(Vocabulary.from_counts(counts, min_count=2), counts)
    assert list(known) == ["train", "val", "test"]
    train, val, test = known.values()
    assert (train.records, train.mentions, train.mentions_known) == (3, 6, 5 / 6)
    assert (train.names, train.names_known) == (3, 2 / 3)
    assert (val.records, val.mentions, val.mentions_known, val.names_known) == (1, 0, None, None)
    assert (test.mentions, test.mentions_known, test.names_known) == (4, 0.5, 1 / 3)


word = st.sampled_from(["egg", "eggs", "red", "onion", "onions", "es", "s", "glass", "glasses", "oil", "a"])
name = st.lists(word, min_size=1, max_size=4).map(" ".join)
recipes = st.lists(
    st.tuples(st.lists(name, max_size=4), st.sampled_from(["train", "train", "val", "test"])), max_size=12
)


def build(found: list[tuple[list[str], str]], min_count: int) -> Vocabulary | None:
    try:
        return Vocabulary.build(
            (record(*names, split=split) for names, split in found), min_count=min_count, limits=None
        )
    except VocabularyError:
        return None


@settings(max_examples=200, deadline=None)
@given(recipes, st.integers(1, 4), st.randoms(use_true_random=False))
def test_properties(found: list[tuple[list[str], str]], least: int, rng: random.Random) -> None:
    vocabulary = build(found, least)
    shuffled = rng.sample(found, len(found))
    again = build([(rng.sample(names, len(names)), split) for names, split in shuffled], least)
    only_train = build([(names, split) for names, split in found if split == "train"], least)
    assert vocabulary == again == only_train  # neither order nor held-out records change anything
    if vocabulary is None:
        return
    assert json.dumps(vocabulary.variants) == json.dumps(again.variants)  # nor the order within
    assert vocabulary.name == again.name
    mentions = Counter(ingredient_key(n) for names, split in found if split == "train" for n in names)
    variants = [variant for group in vocabulary.variants.values() for variant in group]
    assert len(variants) == len(set(variants))  # each variant to one canonical name
    assert all(count >= least for count in vocabulary.counts.values())
    for canonical, group in vocabulary.variants.items():
        assert group == {variant: mentions[variant] for variant in group}
        assert vocabulary.normalise(canonical) == canonical
        for variant in group:
            assert (
                vocabulary.normalise(variant) == vocabulary.normalise(variant.replace("_", " ")) == canonical
            )
    # what is not kept is rare as a whole: the groups of all names make up every mention
    everything = build(found, 1)
    assert everything is not None
    assert sum(everything.counts.values()) == mentions.total()
    assert vocabulary.counts == {n: c for n, c in everything.counts.items() if c >= least}


@settings(max_examples=200, deadline=None)
@given(st.sets(name.map(ingredient_key)))
def test_merging_ends(names: set[str]) -> None:
    heads = merge_names(names)
    assert set(heads) == names
    assert all(head in names and heads[head] == head for head in heads.values())


def test_saved_and_loaded(tmp_path: Path) -> None:
    records = [record("Crème fraîche", "eggs", "egg")] * 2
    for limits in (Limits(), Limits(ingredients=(1, 5), instructions=(0, 3), characters=0), None):
        vocabulary = Vocabulary.build(records, min_count=2, limits=limits)
        path = tmp_path / "deep" / "v.json"
        vocabulary.save(path)
        loaded = Vocabulary.load(path)
        assert loaded == vocabulary
        assert loaded.name == vocabulary.name
        assert loaded.normalise("CRÈME FRAÎCHE") == "creme_fraiche"
        first = path.read_bytes()
        loaded.save(path)
        assert path.read_bytes() == first
    assert json.loads(path.read_text())["ingredients"]["egg"] == {
        "count": 4,
        "variants": {"egg": 2, "eggs": 2},
    }
    assert [p.name for p in path.parent.iterdir()] == ["v.json"]


def test_the_name_tells_what_is_merged() -> None:
    one = Vocabulary({"egg": {"egg": 3, "eggs": 1}, "salt": {"salt": 9}})
    assert one.name.startswith("2 ingredients, sha256 ")
    assert (
        one.name == Vocabulary({"salt": {"salt": 1}, "egg": {"eggs": 1, "egg": 1}}).name
    )  # counts do not matter
    assert one.name != Vocabulary({"egg": {"egg": 3}, "salt": {"salt": 9}}).name


def test_what_cannot_be_built() -> None:
    with pytest.raises(VocabularyError, match=r"^no training record.*the records are: 1 val, 2 test$"):
        Vocabulary.build([record("a", "b", split=s) for s in ("val", "test", "test")])
    with pytest.raises(VocabularyError, match="the records are: none"):
        Vocabulary.build([])
    with pytest.raises(
        VocabularyError, match=r"^none of 1 training records has 2 to 19 ingredients.*--all-records"
    ):
        Vocabulary.build([record("a")])
    with pytest.raises(VocabularyError, match="no ingredient was named 10 times in 1 training records"):
        Vocabulary.build([record("a", "b")])
    with pytest.raises(VocabularyError, match="min_count: expected at least 1, got 0"):
        Vocabulary.build([record("a", "b")], min_count=0)
    with pytest.raises(RecordError, match=r"^record 'r\d+': split: missing; a vocabulary counts"):
        Vocabulary.build([record("a", "b", split=None)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"version: expected 1, got 2"),
        ({"version": ...}, r"no version in it"),
        ({"ingredients": ...}, r"not a vocabulary of `rode data vocabulary`: KeyError: 'ingredients'"),
        (
            {"ingredients": {"egg": {"count": 1, "variants": {"eggs": 1}}}},
            r"'egg': expected it among its own",
        ),
        ({"ingredients": {"egg": {"count": 3, "variants": {"egg": 1}}}}, r"do not sum to 3"),
        (
            {"ingredients": {"egg": {"count": 1, "variants": {"egg": "1"}}}},
            r"ingredients.egg.egg: expected a count",
        ),
        (
            {"ingredients": {"Egg": {"count": 1, "variants": {"Egg": 1}}}},
            r"'Egg' is no normalised name; build",
        ),
        ({"ingredients": ["egg"]}, r"AttributeError"),
        (
            {"ingredients": {n: {"count": 2, "variants": {n: 1, "c": 1}} for n in "ab"}},
            r"'c': a variant of 'a' and of 'b'",
        ),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "v.json"
    Vocabulary({"egg": {"egg": 1}}).save(path)
    value = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: entry for key, entry in value.items() if entry is not ...}))
    with pytest.raises(VocabularyError, match=message) as caught:
        Vocabulary.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_no_vocabulary_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such vocabulary; `rode data vocabulary` builds one"):
        Vocabulary.load(tmp_path / "v.json")
    (tmp_path / "v.json").write_text("[1")
    with pytest.raises(VocabularyError, match=r"v.json: not JSON"):
        Vocabulary.load(tmp_path / "v.json")
    (tmp_path / "v.json").write_text("[1]")
    with pytest.raises(VocabularyError, match=r"v.json: not a vocabulary"):
        Vocabulary.load(tmp_path / "v.json")


def command(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    data_vocabulary.add_parser(parser.add_subparsers())
    args = parser.parse_args(["vocabulary", *argv])
    return args.run(args)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "r.jsonl", tmp_path / "v.json"
    plain = [record("egg", "salt") for _ in range(2)]
    write_records(source, [*plain, record("eggs", steps=()), record("yuzu", "salt", split="test")])
    assert command(str(source), str(out), "--min-count", "2") == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{Vocabulary.load(out).name}; of 2 names in 2 of 3 training records",
        "train: 3 records; knows 80.0 % of 5 mentions, 66.7 % of 3 names",
        "test: 1 records; knows 50.0 % of 2 mentions, 50.0 % of 2 names",
        f"vocabulary in {out}",
    ]
    assert command(str(source), str(out), "--min-count", "2", "--all-records") == 0
    assert Vocabulary.load(out).variants["egg"] == {"egg": 2, "eggs": 1}
    before = out.read_bytes()
    with pytest.raises(VocabularyError):
        command(str(source), str(out))
    assert out.read_bytes() == before


@pytest.mark.data
def test_real_recipes(rode_data: Path, tmp_path: Path) -> None:
    """664 recipes, most without a photograph: right merges, and wrong ones that the protocol makes."""
    food = rode_data / "food_photos"
    photos, texts = (json.loads((food / name).read_text()) for name in ("photos.json", "texts.json"))
    (tmp_path / "photos.json").write_text(json.dumps(photos + [t | {"image": "none.jpg"} for t in texts]))
    fractions = {"train": 0.8, "val": 0.1, "test": 0.1}
    records = (
        dataclasses.replace(r, split=hash_split(r.id, fractions, 0))
        for r in read_source("food-photos", tmp_path, ReadLog())
    )
    counts = count_names(records)
    vocabulary = Vocabulary.from_counts(counts, min_count=5)
    assert 100 < len(vocabulary) < 150
    right = {
        "extra virgin olive oil": "oil",
        "eggs": "egg",
        "tomatoes": "tomato",
        "light soy sauce": "soy_sauce",
        "unsalted butter": "butter",
        "baking powder": "baking_powder",
        "cloves of garlic": "garlic",
    }
    wrong = {
        "peanut butter": "butter",
        "black beans": "black",
        "fish sauce": "fish",
        "bay leaves": "bay_leaves",
    }
    for expected in (right, wrong):
        assert {name: vocabulary.normalise(name) for name in expected} == expected
    assert vocabulary.normalise("bay leaf") == "bay_leaf"
    known = coverage(vocabulary, counts)
    assert known["train"].mentions_known > 0.8 > known["test"].mentions_known > 0.65
