"""A large file's examples, made when they are taken, are those that a small file's would be."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pickle
import re
from multiprocessing import get_context

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odd_dishes import dishes
from rode.vlm.packing import pack_by_picture
from rode_food import RecordError, Source, data_mixture, load_examples, record_scan, write_records
from rode_food.file_examples import FileExamples
from rode_food.record_scan import Scan, scan_file

SPLITS = {"train": 0.6, "test": 0.4}
names = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6).filter(str.strip)
records = st.fixed_dictionaries(
    {"source": st.sampled_from(["a", "b"])},
    optional={
        "image": st.sampled_from(["0.png", "1.png", "./1.png", "/there/2.png", ["0.png", "1.png"]]),
        "split": st.sampled_from(["train", "test", None]),
        "category": names,
        "ingredients": st.lists(st.fixed_dictionaries({"name": names}), max_size=3),
        "instructions": st.lists(names, max_size=2),
        "conversation": st.lists(st.fixed_dictionaries({"question": names, "answer": names}), max_size=3),
    },
)


def lines_of(drawn, *, bom=False, end=b"\n"):
    """A file of records as it may come: ids in order, empty lines between."""
    lines = [json.dumps({"id": str(i), **record}, ensure_ascii=i % 2 == 0) for i, record in enumerate(drawn)]
    text = end.join(line.encode() + (end if i % 3 == 0 else b"") for i, line in enumerate(lines))
    return (b"\xef\xbb\xbf" if bom else b"") + text


def both(sources, split, **options):
    """A mixture whose files are held, and one whose files are read when an example is taken."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_mixture, "INDEXED_FROM", 10**9)
        held = load_examples(sources, split, **options)
        patch.setattr(data_mixture, "INDEXED_FROM", 0)
        return held, load_examples(sources, split, **options)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(records, min_size=1, max_size=9),
    st.booleans(),
    st.sampled_from([b"\n", b"\r\n"]),
    st.sampled_from(["first", "all", "random"]),
    st.sampled_from([None, "name"]),
    st.integers(1, 4),
)
def test_the_same_examples_in_the_same_order(tmp_path_factory, drawn, bom, end, wording, name, most):
    path = tmp_path_factory.mktemp("file") / "records.jsonl"
    path.write_bytes(lines_of(drawn, bom=bom, end=end))
    source = Source(str(path), name=name, split_fractions=SPLITS, fraction=0.8, weight=1.5)
    for split in ("train", "test"):
        try:
            held, found = both([source], split, wording=wording, seed=3)
        except ValueError:  # no example of the split
            continue
        part = found.parts()[0]
        assert isinstance(part, FileExamples)
        assert list(part) == held.examples
        assert [part[i] for i in reversed(range(len(part)))] == held.examples[::-1]
        assert part[-1] == held.examples[-1]
        assert part[1:3] == held.examples[1:3]
        texts = [e.question + e.answer for e in held.examples]
        assert part.lengths.tolist() == list(map(len, texts))
        assert part.bytes.tolist() == [len(text.encode()) for text in texts]
        assert part.pictures() == list(dict.fromkeys(path for e in held.examples for path in e.images))
        assert list(part.packed(most)) == pack_by_picture(held.examples, most)
        assert part.packed(most).lengths.tolist() == [
            sum(len(e.question + e.answer) for e in pack) for pack in pack_by_picture(held.examples, most)
        ]
        left = part.without([0])
        assert list(left) == held.examples[1:]
        assert list(left.packed(most)) == pack_by_picture(held.examples[1:], most)
        if most == 1:
            assert found.plan(2) == held.plan(2)


def test_an_epoch_of_several_sources_keeps_its_order(tmp_path):
    """A file may grow past the limit: the order of the records that were there is as before only if the plan does not ask
    how they are held."""
    for name in ("one", "two"):
        write_records(
            tmp_path / f"{name}.jsonl",
            [dataclasses.replace(r, id=name + r.id) for r in dishes(tmp_path / name, 30)],
        )
    sources = [Source(str(tmp_path / "one.jsonl"), weight=0.5), Source(str(tmp_path / "two.jsonl"), weight=2)]
    held, found = both(sources, "train")
    for epoch in range(3):
        assert found.plan(epoch) == held.plan(epoch)
        assert [found.examples[i] for i in found.plan(epoch)] == [held.examples[i] for i in held.plan(epoch)]


DAMAGE = {
    "no JSON": b'{"id": ',
    "no UTF-8": b'{"id": "\xff"}',
    "no field of ours": b'{"id": "new", "source": "a", "colour": "red"}',
    "an id again": b'{"id": "3", "source": "b", "split": "train"}',
    "no split": b'{"id": "new", "source": "a"}',
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("processes", [1, 2, 5])
@pytest.mark.parametrize("place", [4, 11, 20])
def test_damage_has_one_message_however_many_read(tmp_path, kind, processes, place):
    path = tmp_path / "records.jsonl"
    lines = [json.dumps({"id": str(i), "source": "a", "split": "train", "category": "x"}) for i in range(20)]
    lines.insert(15, "{broken, too" if place < 15 else "")
    lines.insert(place, DAMAGE[kind].decode("latin-1"))
    path.write_bytes("\n".join(lines).encode("latin-1"))
    source = Source(str(path), tasks=("category",))
    with pytest.raises(RecordError) as held:
        load_examples([source], "train")
    with pytest.raises(RecordError) as found:
        scan_file(Scan(source, "train"), processes)
    assert str(found.value) == str(held.value)
    if kind != "no split":
        assert re.match(rf"{re.escape(str(path))}:{place + 1}: ", str(found.value))


@pytest.mark.parametrize("processes", [2, 3, 7, 40])
def test_any_number_of_processes_finds_the_same(tmp_path, processes):
    path = tmp_path / "records.jsonl"
    write_records(path, dishes(tmp_path / "pictures", 40))
    scan = Scan(Source(str(path)), "train")
    one, many = scan_file(scan, 1), scan_file(scan, processes)
    for column in dataclasses.fields(one):
        assert getattr(one, column.name).tolist() == getattr(many, column.name).tolist()


def test_a_process_that_dies_costs_time_and_says_so(tmp_path, monkeypatch, caplog):
    path = tmp_path / "records.jsonl"
    write_records(path, dishes(tmp_path / "pictures", 20))
    scan = Scan(Source(str(path)), "train")
    want = scan_file(scan, 1).offsets.tolist()
    monkeypatch.setattr(record_scan.sys, "executable", "/bin/false")
    assert scan_file(scan, 2).offsets.tolist() == want
    assert "ended with 1; its part is read again" in caplog.text


def test_a_hash_that_two_ids_share_is_no_repetition(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    write_records(path, dishes(tmp_path / "pictures", 6))
    monkeypatch.setattr(record_scan, "_key", lambda text: 7)
    assert len(scan_file(Scan(Source(str(path)), "train"), 1).ids) == 6


def test_a_packed_file_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(data_mixture, "INDEXED_FROM", 0)
    write_records(tmp_path / "records.jsonl", dishes(tmp_path / "pictures", 6))
    (tmp_path / "records.jsonl.gz").write_bytes(gzip.compress((tmp_path / "records.jsonl").read_bytes()))
    examples = load_examples([Source(str(tmp_path / "records.jsonl.gz"))], "train").examples
    assert isinstance(examples, list)


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "records.jsonl"
    write_records(path, dishes(tmp_path / "pictures", 20))
    return path, FileExamples(Scan(Source(str(path)), "train"))


def test_a_file_that_was_written_to_is_noticed(large):
    path, examples = large
    first = examples[0]
    path.write_text(path.read_text().replace("dish", "DISH"))
    with pytest.raises(RecordError, match="the file has changed since it was indexed; start again"):
        examples[5]
    with pytest.raises(RecordError, match="has changed"):
        pickle.loads(pickle.dumps(examples))[5]
    assert examples[0] == first  # it is at hand still


def test_a_file_that_was_replaced_is_read_as_it_was(large):
    path, examples = large
    want = list(examples)
    write_records(path, dishes(path.parent / "others", 3))  # written aside, then renamed
    assert list(examples) == want
    with pytest.raises(RecordError, match="has changed"):
        pickle.loads(pickle.dumps(examples))[0]


def take(examples, numbers, queue):
    queue.put([examples[i] for i in numbers])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_at_their_own_places(large, method):
    _, examples = large
    want, context = list(examples), get_context(method)
    queue = context.Queue()
    orders = [list(range(len(examples))), list(reversed(range(len(examples))))]
    started = [context.Process(target=take, args=(examples, order, queue)) for order in orders]
    for process in started:
        process.start()
    found = [queue.get(timeout=60) for _ in started]
    for process in started:
        process.join()
    assert sorted(found, key=lambda part: part[0] != want[0]) == [want, want[::-1]]
