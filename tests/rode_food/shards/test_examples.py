"""Shards ask what the file of records asks, in an order of their own: a function of seed and epoch, a few shards at a time."""

from __future__ import annotations

import dataclasses
import pickle
import random
from collections import Counter

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from odd_dishes import dishes
from rode.evaluation.evaluate import evaluation_examples
from rode.training.order import EpochSampler
from rode.vlm.packing import pack_by_picture
from rode_food import Source, load_examples, write_records
from rode_food.data_mixture import Joined
from rode_food.shards.address import ShardError
from rode_food.shards.examples import ShardExamples
from rode_food.shards.index import open_shards
from rode_food.shards.order import shuffle_blocks
from rode_food.shards.write import write_shards


@pytest.fixture(scope="module")
def food(tmp_path_factory):
    """records.jsonl, and the same as tar/ and parquet/ in shards of 6."""
    folder = tmp_path_factory.mktemp("food")
    records = dishes(folder / "pictures", 60)
    write_records(folder / "records.jsonl", records)
    write_shards(records, folder / "tar", size=6)
    write_shards(records, folder / "parquet", format="parquet", size=6)
    return folder


def loose(example):
    """An example without where its picture lies."""
    return dataclasses.replace(example, image="-")


def by_content(examples):
    return Counter(map(repr, map(loose, examples)))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("wording", ["first", "random", "all"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"name": "mine", "tasks": ("nutrition", "category")},
        {"fraction": 0.4},
        {"tasks": ("recipe",), "fraction": 0.7},
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_same_questions_as_the_file_s(food, kind, wording, fields, split):
    of_file = load_examples(
        [Source(str(food / "records.jsonl"), **fields)], split, wording=wording, seed=5
    ).examples
    mixture = load_examples([Source(str(food / kind), **fields)], split, wording=wording, seed=5)
    assert by_content(mixture.examples) == by_content(of_file)
    assert len(mixture) == mixture.counts[0] == len(of_file) == len(list(mixture.examples))
    (shards,) = mixture.parts()
    assert isinstance(shards, ShardExamples)
    lengths = [len(e.question) + len(e.answer) for e in shards]
    if wording == "random":  # a question's length is its task's mean then
        assert all(abs(a - b) < 40 for a, b in zip(shards.lengths, lengths, strict=True))
    else:
        assert shards.lengths.tolist() == lengths


@pytest.mark.parametrize("most", [1, 2, 3, 4, 9])
def test_packs(food, most):
    (shards,) = load_examples([Source(str(food / "tar"))], "train", wording="all").parts()
    packs = shards.packed(most)
    assert list(packs) == pack_by_picture(list(shards), most)
    assert packs.lengths.tolist() == [sum(len(e.question) + len(e.answer) for e in pack) for pack in packs]
    assert sorted(packs.shuffled(random.Random(0))) == list(range(len(packs)))
    assert not isinstance(shards[0], tuple)


def test_little_is_held_and_it_pickles(food):
    (shards,) = load_examples([Source(str(food / "tar"))], "train").parts()
    arrays = [a for a in vars(shards).values() if hasattr(a, "nbytes")]
    assert sum(a.nbytes for a in arrays) == 12 * len(shards)
    again = pickle.loads(pickle.dumps(shards))
    assert list(again) == list(shards)
    assert shards[-1] == list(shards)[-1]
    assert shards[3:9:2] == list(shards)[3:9:2]
    with pytest.raises(IndexError):
        shards[len(shards)]


def test_evaluation_takes_the_first_ones(food):
    sources = [Source(str(food / "tar"), weight=0.0), Source(str(food / "records.jsonl"))]
    found = evaluation_examples(sources, "test", limit=5)
    assert isinstance(found, list)
    assert len(found) == 10
    assert by_content(found[5:]) == by_content(load_examples([sources[1]], "test").examples[:5])
    everything = evaluation_examples(sources[:1], "test")
    assert by_content(everything) == by_content(load_examples([sources[1]], "test").examples)


def test_a_folder_without_a_split_and_without_shards(food, tmp_path):
    with pytest.raises(ValueError, match=r"no example of split 'val' in .*tar"):
        load_examples([Source(str(food / "tar"))], "val")
    with pytest.raises(ShardError, match=r"no folder of shards: index\.json is missing"):
        load_examples([Source(str(tmp_path))], "train")
    with pytest.raises(ValueError, match="shuffle_shards of x: expected at least 1, got 0"):
        Source("x", shuffle_shards=0)


def test_shards_of_a_program_that_asked_otherwise(food, monkeypatch):
    (shards,) = load_examples([Source(str(food / "tar"))], "train").parts()
    monkeypatch.setattr("rode_food.lazy_examples.make_examples", lambda *_, **__: [])
    with pytest.raises(ShardError, match="written by a version that asked other questions"):
        shards[0]


@given(
    sizes=st.lists(st.integers(1, 9), max_size=12),
    window=st.integers(1, 14),
    seed=st.integers(0, 2**32),
)
def test_a_block_shuffle_visits_everything_once_and_a_few_shards_at_a_time(sizes, window, seed):
    order = shuffle_blocks(sizes, window, random.Random(seed))
    assert sorted(order) == list(range(sum(sizes)))
    assert order == shuffle_blocks(sizes, window, random.Random(seed))
    shard = [s for s, size in enumerate(sizes) for _ in range(size)]
    met = [shard[i] for i in order]
    finished: set[int] = set()
    at_hand: list[int] = []
    for position, s in enumerate(met):
        assert s not in finished
        if s not in at_hand:
            at_hand.append(s)
        if len(at_hand) == window and not set(at_hand) & set(met[position + 1 :]):
            finished |= set(at_hand)
            at_hand = []
        assert len(at_hand) <= window


def test_known_order():
    """The same on another machine and in another process."""
    assert shuffle_blocks([3, 3, 3, 3], 2, random.Random(7)) == [10, 3, 11, 4, 9, 5, 1, 6, 8, 0, 7, 2]
    with pytest.raises(ValueError, match="window: expected at least 1 shard, got 0"):
        shuffle_blocks([1], 0, random.Random(0))


def plans(food, sources, epochs, seed=0):
    mixture = load_examples([Source(str(food / p), **f) for p, f in sources], "train", seed=seed)
    return mixture, [mixture.plan(epoch) for epoch in range(epochs)]


def test_an_epoch_s_order(food):
    sources = [("tar", {"shuffle_shards": 2})]
    mixture, (first, second, third) = plans(food, sources, 3)
    for plan in (first, second, third):
        assert sorted(plan) == list(range(len(mixture)))
    assert first != second != third != first
    assert plans(food, sources, 3)[1] == [first, second, third]
    assert plans(food, sources, 1, seed=1)[1][0] != first
    (shards,) = mixture.parts()
    number = [shards.shards.shard_of(int(s)) for s in shards._record]
    assert len({number[i] for i in first[: len(first) // 5]}) <= 3  # of 8 shards
    assert len({number[i] for i in plans(food, [("tar", {})], 1)[1][0][: len(first) // 5]}) > 5


def test_sources_take_turns_and_weights_hold(food):
    sources = [
        ("tar", {"shuffle_shards": 2, "weight": 0.5, "name": "a"}),
        ("records.jsonl", {"weight": 2.0, "name": "b"}),
        ("parquet", {"name": "c"}),
    ]
    mixture, both = plans(food, sources, 2)
    count = mixture.counts[0]
    assert isinstance(mixture.examples, Joined)
    assert mixture.counts == [count] * 3
    for plan in both:
        assert Counter(i // count for i in plan) == {0: round(count / 2), 1: 2 * count, 2: count}
        assert sorted(i for i in plan if i >= 2 * count) == list(range(2 * count, 3 * count))
        turns = [i // count for i in plan]
        tenth = len(turns) // 10
        assert all(set(turns[k : k + tenth]) == {0, 1, 2} for k in range(0, 9 * tenth, tenth))
    drawn = Counter(i for plan in both for i in plan if i < count)
    assert set(drawn) == set(range(count))  # half in one epoch and half in the next
    assert [e.source for e in mixture.examples[count - 1 : count + 1]] == ["a", "b"]
    assert mixture.examples[-1].source == "c"


def identity(batch):
    return [(e.record_id, e.task) for e in batch]


@pytest.mark.parametrize("grouped", [False, True])
def test_workers_ranks_and_resuming_keep_the_order(food, grouped):
    mixture = load_examples([Source(str(food / "tar"), shuffle_shards=2)], "train")
    (shards,) = mixture.parts()
    sampler = EpochSampler(mixture.plan, shards.lengths if grouped else None, batch_size=4, seed=3)
    sampler.set_epoch(1)
    order = identity([shards[i] for i in sampler])
    assert sorted(order) == sorted(identity(shards))
    batches = BatchSampler(sampler, 4, drop_last=False)
    for workers in (0, 2):
        loader = DataLoader(mixture.examples, batch_sampler=batches, num_workers=workers, collate_fn=identity)
        assert [item for batch in loader for item in batch] == order
    ranks = [
        [
            item
            for batch in DataLoader(
                mixture.examples,
                batch_sampler=BatchSamplerShard(batches, num_processes=2, process_index=rank),
                collate_fn=identity,
            )
            for item in batch
        ]
        for rank in (0, 1)
    ]
    rows = [[rank[i : i + 4] for i in range(0, len(rank), 4)] for rank in ranks]
    together = [item for pair in zip(*rows, strict=True) for batch in pair for item in batch]
    assert together[: len(order)] == order
    assert set(together[len(order) :]) <= set(
        order[:8]
    )  # what fills the last batches, so that ranks have as many
    if (
        grouped
    ):  # still a few shards at a time: stretches of 50 batches hold all of these; see the sampler's own test
        assert order != identity([shards[i] for i in mixture.plan(1)])


def test_like_with_like_stays_within_its_stretch():
    order = random.Random(0).sample(range(1000), 1000)
    lengths = [i * 37 % 101 for i in range(1000)]
    sampler = EpochSampler(lambda epoch: order, lengths, batch_size=4, seed=0)
    found = list(sampler)
    for first in range(0, 1000, 200):
        assert set(found[first : first + 200]) == set(order[first : first + 200])
    assert found != order


def test_open_again_after_the_files_were_replaced(food, tmp_path):
    records = dishes(tmp_path / "pictures", 6, split="train")
    write_shards(records[:3], tmp_path / "out")
    before = {open_shards(tmp_path / "out").record(i).id for i in range(3)}
    write_shards(records[3:], tmp_path / "out", overwrite=True)
    after = {open_shards(tmp_path / "out").record(i).id for i in range(3)}
    assert before == {r.id for r in records[:3]}
    assert after == {r.id for r in records[3:]}
