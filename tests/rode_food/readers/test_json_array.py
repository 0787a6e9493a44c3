from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.readers import json_array
from rode_food.readers.index import JsonIndex
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.records import RecordError

SPACE = st.text(" \t\r\n", max_size=4)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8"), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab{}[],\"\\é", max_size=3), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
OBJECTS = st.dictionaries(st.text('id\n{}[],"\\é', max_size=4), VALUES, max_size=4)


@st.composite
def files(draw: st.DrawFn) -> tuple[list[dict], list[int], list[int], bytes]:
    """(objects, the line and the offset of each, the file), in any layout."""
    objects = draw(st.lists(OBJECTS, max_size=6))
    data = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + draw(SPACE).encode() + b"["
    lines, offsets = [], []
    for number, value in enumerate(objects):
        data += (b"," if number else b"") + draw(SPACE).encode()
        lines.append(1 + data.count(b"\n"))
        offsets.append(len(data))
        options = {"ensure_ascii": draw(st.booleans()), "indent": draw(st.sampled_from([None, 0, 2]))}
        data += json.dumps(value, **options).encode() + draw(SPACE).encode()
    return objects, lines, offsets, data + draw(SPACE).encode() + b"]" + draw(SPACE).encode()


@given(files(), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_any_array_is_read_whatever_its_layout_and_the_buffer(
    tmp_path_factory: pytest.TempPathFactory, made: tuple, buffer_size: int
) -> None:
    objects, lines, offsets, data = made
    path = tmp_path_factory.mktemp("json") / "a.json"
    path.write_bytes(data)
    entries = list(read_json_array(path, ReadLog(strict=True), buffer_size=buffer_size))
    assert [entry.value for entry in entries] == objects
    assert [entry.line for entry in entries] == lines
    assert [entry.offset for entry in entries] == offsets
    assert [json.loads(data[e.offset : e.offset + e.length]) for e in entries] == objects


def entry(number: int, **more: object) -> bytes:
    value = {"id": f"{number:04x}", "images": [{"id": f"{number}.jpg", "url": "u"}, {"id": "b"}], **more}
    return json.dumps(value, ensure_ascii=False).encode()


def read(path: Path, data: bytes, buffer_size: int = 1 << 20) -> tuple[list[str], list[tuple]]:
    """(ids that are read, (reason, line) of what is broken)."""
    path.write_bytes(data)
    log = ReadLog()
    entries = list(read_json_array(path, log, keys=("id", "images"), buffer_size=buffer_size))
    assert log.broken == log.counts
    return [e.value.get("id") for e in entries], [(p.reason, p.line) for p in log.problems]


DAMAGE = {
    "a word that is no JSON": entry(1).replace(b'"url"', b"url", 1),
    "a missing quote": entry(1).replace(b'.jpg"', b".jpg", 1),
    "a missing brace at the end": entry(1)[:-1],
    "cut in the middle of a string": entry(1)[:30],
    "cut behind an inner object": entry(1)[: entry(1).index(b"}") + 1],
    "a control character in a string": entry(1).replace(b".jpg", b".j\npg", 1),
    "a closing brace too many": entry(1) + b"}",
    "a wrong bracket": entry(1).replace(b"]", b"}", 1),
    "zeros": b"\0" * 40,
    "too deep": b"[" * 200_000,
    "a number of too many digits": b'{"id": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("layout", ["an entry a line", "all on one line", "comma first"])
@pytest.mark.parametrize("buffer_size", [1 << 20, 64])
def test_a_broken_entry_costs_itself_alone(
    tmp_path: Path, damage: str, layout: str, buffer_size: int
) -> None:
    between = {"an entry a line": b",\n", "all on one line": b", ", "comma first": b"\n,"}[layout]
    parts = [entry(0), DAMAGE[damage], entry(2), entry(3)]
    ids, broken = read(tmp_path / "a.json", b"[" + between.join(parts) + b"]", buffer_size)
    # a closing brace too many hurts no entry
    assert ids == ["0000", *(["0001"] if damage == "a closing brace too many" else []), "0002", "0003"]
    extra = DAMAGE[damage].count(b"\n") if damage == "a control character in a string" else 0
    assert [line for _, line in broken] == [1 if layout == "all on one line" else 2]
    assert broken[0][0] == "invalid JSON"
    assert extra == (damage == "a control character in a string")


@pytest.mark.parametrize(
    ("data", "ids", "broken"),
    [
        (b"[" + entry(0) + b",\n" + entry(1, title="\xff").replace("\xff".encode(), b"\xff") + b",\n" + entry(2) + b"]",
         ["0000", "0002"], [("invalid UTF-8", 2)]),
        (b"[" + entry(0) + b',\n"text",\n null, 5,' + entry(2) + b"]",
         ["0000", "0002"],
         [("an entry that is no object", 2), ("an entry that is no object", 3), ("an entry that is no object", 3)]),
(b"[" + entry(0) + b",\n[" + entry(1) + b",\n" + entry(2) + b"]", ["0000", "0001", "0002"],
         [("an entry that is no object", 2)]),
        (b"[" + entry(0) + b",\n[" + entry(1) + b"],\n" + entry(2) + b"]", ["0000", "0001", "0002"],
         [("an entry that is no object", 2), ("invalid JSON", 2)]),
        (b"[" + b"1" * 50 + b",\n" + entry(2) + b"]", ["0002"], [("an entry that is no object", 1)]),
        # an object of an entry's keys inside a broken one is no entry
        (b"[" + entry(0) + b',\n{oops, "like":\n' + entry(1) + b"},\n" + entry(2) + b"]", ["0000", "0002"],
         [("invalid JSON", 2)]),
        (b"[" + entry(0) + b"\n" + entry(1) + b"]", ["0000", "0001"], [("invalid JSON", 2)]),
        (b"[" + entry(0) + b",\n]", ["0000"], [("invalid JSON", 2)]),
        (b"[" + entry(0) + b"]\n\nmore", ["0000"], [("invalid JSON", 3)]),
        (b"[" + entry(0) + b",\n" + entry(1)[:40], ["0000"], [("invalid JSON", 2)]),
        (b"[" + entry(0) + b",\n", ["0000"], [("a file cut short", 2)]),
        (b"[" + entry(0) + b",\n" + entry(1), ["0000", "0001"], [("a file cut short", 2)]),
        (b"[\n", [], [("a file cut short", 2)]),
        (b"[" + entry(0) + b",\n" + entry(1).replace(b".jpg", b"\\ud83d", 1) + b"," + entry(2) + b"]",
         ["0000", "0002"], [("invalid UTF-16", 2)]),
        (b"[" + entry(0) + b",\n" + entry(1).replace(b".jpg", b"\\ud83c\\udf5d", 1) + b"]", ["0000", "0001"], []),
    ],
)  # fmt: skip
@pytest.mark.parametrize("buffer_size", [1 << 20, 16])
def test_what_is_reported(
    tmp_path: Path, data: bytes, ids: list[str], broken: list[tuple], buffer_size: int
) -> None:
    assert read(tmp_path / "a.json", data, buffer_size) == (ids, broken)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_no_damage_stops_the_reader_or_costs_a_far_entry(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    whole = b"[" + b",\n".join(entry(n) for n in range(12)) + b"]"
    at = data.draw(st.integers(1, len(whole) // 2))
    cut = data.draw(st.integers(0, 40))
    bytes_ = whole[:at] + data.draw(st.binary(max_size=20)) + whole[at + cut :]
    path = tmp_path_factory.mktemp("json") / "a.json"
    ids, _ = read(path, bytes_, data.draw(st.integers(16, 4096)))
    # what lies two entries behind the damage is read, whatever the damage
    last = whole.count(b"\n", 0, at + cut) + 2
    assert ids[-(12 - last) :] == [f"{n:04x}" for n in range(last, 12)]


def test_strict_stops_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + entry(0) + b",\n{oops},\n" + entry(1) + b"]")
    with pytest.raises(RecordError, match=rf"^{path}:2: invalid JSON: Expecting property name"):
        list(read_json_array(path, ReadLog(strict=True)))


@pytest.mark.parametrize("data", [b"", b'{"id": 1}', b"\xff\xfe[\0"])
def test_no_array(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(RecordError, match=rf"^{path}: expected a JSON array, got "):
        list(read_json_array(path, ReadLog()))


def test_memory_is_that_of_a_buffer(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join(entry(n, text="x" * 1000) for n in range(8000)) + b"]")  # 8.6 MB
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_json_array(path, ReadLog(), keys=("id",), buffer_size=1 << 17))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 8000
    assert peak < 8 << 17


def test_an_entry_without_end_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_array, "MAX_ENTRY", 1 << 16)
    endless = entry(1)[: entry(1).index(b"}") + 1]  # the list of images goes on over all entries behind
    entries = [entry(n, text="x" * 1000) for n in range(2, 4000)]
    (tmp_path / "a.json").write_bytes(b"[" + b",\n".join([entry(0), endless, *entries]) + b"]")  # 4.3 MB
    del entries
    log = ReadLog()
    tracemalloc.start()
    try:
        count = sum(
            1 for _ in read_json_array(tmp_path / "a.json", log, keys=("id", "images"), buffer_size=4096)
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == 3999
    assert [(p.reason, p.line) for p in log.problems] == [("invalid JSON", 2)]
    assert peak < 1 << 21


def test_index(tmp_path: Path) -> None:
    path = tmp_path / "layer2.json"
    twice = entry(3).replace(b"3.jpg", b"other.jpg")
    entries = [entry(n, title="né" * n) for n in (3, 0, 7)] + [
        twice,
        b'{"id": "x"}',
        b'{"id": 5, "images": 1}',
    ]
    path.write_bytes(b"[" + b",\n".join(entries) + b"]")
    log = ReadLog()
    index = JsonIndex(path, log, keys=("id", "images"))
    found = {name: index.get(name) for name in ("0003", "0000", "0007", "0001")}
    assert [(name, f and (f.value["title"], f.line)) for name, f in found.items()] == [
        ("0003", ("né" * 3, 1)),
        ("0000", ("", 2)),
        ("0007", ("né" * 7, 3)),
        ("0001", None),
    ]
    assert [str(p) for p in log.problems] == [
        f"{path}:5: no images",
        f"{path}:6: an id that is no string",
        f"{path}:4: an id that stands twice: 0003",
    ]
    index.close()


def test_ids_of_one_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rode_food.readers.index.id_hash", lambda identifier: len(identifier))
    path = tmp_path / "layer2.json"
    path.write_bytes(b"[" + b",".join(entry(n) for n in range(5)) + b"]")
    log = ReadLog(strict=True)
    index = JsonIndex(path, log, keys=("id", "images"))
    assert [index.get(f"{n:04x}").value["images"][0]["id"] for n in range(5)] == [  # type: ignore[union-attr]
        f"{n}.jpg" for n in range(5)
    ]
    assert index.get("abcd") is None
    index.close()


def test_an_empty_index(tmp_path: Path) -> None:
    path = tmp_path / "layer2.json"
    path.write_bytes(b"[]")
    index = JsonIndex(path, ReadLog(), keys=("id",))
    assert (len(index), index.get("a")) == (0, None)
    index.close()
