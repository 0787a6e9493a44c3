"""What is written is what was given, to other readers too; the same bytes whatever happened on the way."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from odd_dishes import IDS, dishes
from rode_food.images import open_picture
from rode_food.records import RecordError, record_from_json, record_to_json
from rode_food.shards.index import open_shards
from rode_food.shards.write import safe_key, write_shards

FORMATS = ("webdataset", "parquet")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def without_image(record):
    return dataclasses.replace(record, image="-")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return dishes(tmp_path_factory.mktemp("pictures"), 40)


@pytest.fixture(scope="module", params=FORMATS)
def folder(request, records, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "out"
    write_shards(records, folder, name="food", format=request.param, size=7)
    return folder


def test_every_record_and_picture_comes_back(folder, records):
    shards = open_shards(folder)
    shards.verify()
    found = {record.id: record for record in map(shards.record, range(len(shards)))}
    assert len(shards) == len(found) == len(records) == 40
    for record in records:
        assert without_image(found[record.id]) == without_image(record)
        with open_picture(found[record.id].image) as file:
            assert file.read() == Path(record.image).read_bytes()
        assert shards.image([*found].index(record.id)) == found[record.id].image


def test_files_and_index(folder):
    shards = open_shards(folder)
    suffix = ".tar" if shards.facts["format"] == "webdataset" else ".parquet"
    names = [f"food-test-{i:06d}{suffix}" for i in range(2)] + [
        f"food-train-{i:06d}{suffix}" for i in range(5)
    ]
    assert [shard.file for shard in shards.shards] == names
    assert [shard.records for shard in shards.shards] == [7, 1, 7, 7, 7, 7, 4]
    assert {path.name for path in folder.iterdir()} == {*names, "index.json", "samples.npy"}
    for shard in shards.shards:
        first = shards.first[shards.shards.index(shard)]
        assert {shards.record(first + i).split for i in range(shard.records)} == {shard.split}


def test_neighbours_in_the_source_are_apart_in_the_shards(folder, records):
    shards = open_shards(folder)
    order = [shards.record(sample).id for sample in range(len(shards))]
    place = {record.id: number for number, record in enumerate(records)}
    train = [place[id] for id in order[8:]]
    assert train != sorted(train)
    assert sum(abs(a - b) == 1 for a, b in pairwise(train)) < 8


def test_the_order_of_the_records_does_not_matter(folder, records, tmp_path):
    kind = open_shards(folder).facts["format"]
    write_shards(records[::-1], tmp_path / "out", name="food", format=kind, size=7)
    ours, theirs = contents(tmp_path / "out"), contents(folder)
    assert json.loads(ours.pop("index.json")) | {"made_of": ""} == json.loads(theirs.pop("index.json")) | {
        "made_of": ""
    }
    assert ours == theirs


def test_a_tar_holds_nothing_but_names_and_bytes(records, tmp_path):
    write_shards(records, tmp_path / "out", size=7)
    shards = open_shards(tmp_path / "out")
    with tarfile.open(tmp_path / "out" / shards.shards[2].file) as tar:
        members = tar.getmembers()
    assert len(members) == 14
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.pax_headers == {}
    for i, (text, picture) in enumerate(zip(members[::2], members[1::2], strict=True)):
        row = shards.samples[shards.first[2] + i]
        assert (text.offset_data, text.size) == (row["record"], row["record_size"])
        assert (picture.offset_data, picture.size) == (row["picture"], row["picture_size"])
        key = safe_key(shards.record(int(shards.first[2]) + i).id)
        assert (text.name, picture.name) == (f"{key}.json", f"{key}.jpg")


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_tars(records, tmp_path, streaming):
    from datasets import Features, Json, Value, load_dataset
    from datasets import Image as Picture

    write_shards(records, tmp_path / "out", name="food", size=7)
    text = Value("string")
    features = Features({"json": Json(), "jpg": Picture(), "__key__": text, "__url__": text})
    rows = load_dataset(
        "webdataset",
        data_files={"train": str(tmp_path / "out/food-train-*.tar")},
        split="train",
        features=features,
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    by_id = {record.id: record for record in records if record.split == "train"}
    seen = set()
    for row in rows:
        record = by_id[row["json"]["id"]]
        seen.add(record.id)
        assert record_from_json({**row["json"], "image": "-"}) == without_image(record)
        assert row["__key__"].endswith(safe_key(record.id))
        with Image.open(record.image) as own:
            assert row["jpg"].tobytes() == own.tobytes()
    assert seen == by_id.keys()


@pytest.mark.parametrize("streaming", [True, False])
def test_datasets_reads_parquet(records, tmp_path, streaming):
    from datasets import load_dataset

    write_shards(records, tmp_path / "out", name="food", format="parquet", size=7)
    rows = load_dataset(
        "parquet",
        data_files={"train": str(tmp_path / "out/food-train-*.parquet")},
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    by_id = {record.id: record for record in records if record.split == "train"}
    seen = set()
    for row in rows:
        record = by_id[row["id"]]
        seen.add(record.id)
        assert record_from_json({**json.loads(row["json"]), "image": "-"}) == without_image(record)
        with Image.open(record.image) as own:
            assert row["image"].tobytes() == own.tobytes()
        fields = {key: row[key] for key in ("id", "source", "title", "category", "split")}
        fields |= {"ingredients": row["ingredients"], "instructions": row["instructions"], "image": "-"}
        fields["nutrition"] = row["nutrition"]
        for holder in [fields, *fields["ingredients"]]:
            if holder["nutrition"] is not None:
                micro = holder["nutrition"]["micronutrients"] or []
                holder["nutrition"]["micronutrients"] = {
                    m["name"]: {"value": m["value"], "unit": m["unit"]} for m in micro
                }
        assert record_from_json(fields) == without_image(record)
    assert seen == by_id.keys()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its files to the garbage collector
def test_webdataset_reads_tars(records, tmp_path):
    import webdataset

    write_shards(records, tmp_path / "out", name="food", size=7)
    urls = sorted(map(str, (tmp_path / "out").glob("food-train-*.tar")))
    rows = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("json", "jpg"))
    by_id = {record.id: record for record in records if record.split == "train"}
    assert {row["id"] for row, _ in rows} == by_id.keys()
    for row, image in rows:
        with Image.open(by_id[row["id"]].image) as own:
            assert image.tobytes() == own.convert("RGB").tobytes()


def test_a_pyarrow_that_writes_otherwise_is_noticed(records, tmp_path, monkeypatch):
    from pyarrow import parquet

    writer = parquet.ParquetWriter
    monkeypatch.setattr(
        parquet, "ParquetWriter", lambda *args, **options: writer(*args, **options | {"compression": "ZSTD"})
    )
    with pytest.raises(RuntimeError, match="does not write byte arrays as they are"):
        write_shards(records, tmp_path / "out", format="parquet")
    assert not list((tmp_path / "out").glob("*.parquet"))


def test_values_that_look_like_others_are_found_in_parquet(tmp_path):
    """Pictures that begin alike, and one that holds another as it stands in a page."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    plain = buffer.getvalue()
    inner = len(plain).to_bytes(4, "little") + plain
    made = dishes(tmp_path / "p", 8)
    for i, record in enumerate(made):
        data = plain + (inner if i % 2 else b"") + bytes(i)  # Pillow does not mind what stands after the end
        Path(record.image).write_bytes(data)
    write_shards(made, tmp_path / "out", format="parquet")
    shards = open_shards(tmp_path / "out")
    by_id = {record.id: Path(record.image).read_bytes() for record in made}
    for record in map(shards.record, range(8)):
        with open_picture(record.image) as file:
            assert file.read() == by_id[record.id]


@given(
    st.lists(st.text(min_size=1, max_size=120).filter(lambda t: t.isprintable() or "\n" in t), unique=True)
)
def test_keys_are_safe_and_differ(ids):
    keys = [safe_key(id) for id in ids]
    assert len(set(keys)) == len(ids)
    for key in keys:
        assert key.isascii()
        assert 0 < len(key) <= 80
        assert not set(key) & set("./\\ *?")
        assert not key.startswith("-")


def test_known_keys():
    assert [safe_key(id) for id in IDS[:7]] == [
        "a%2Fb",
        "%2E%2E%2Fup",
        "x%2Etar",
        "%2Drf",
        "na%C3%AFve%20%E7%B2%A5",
        "A%20B",
        "a%252Fb",
    ]
    assert safe_key("n" * 300).startswith("n" * 46 + "%-")
    assert safe_key("dish_0-1") == "dish_0-1"


def test_written_again_it_stays_and_other_records_need_leave(records, tmp_path):
    out = tmp_path / "out"
    first = write_shards(records, out, size=7)
    assert str(first).startswith("40 records (32 train, 8 test) in 7 shards, ")
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert write_shards(records, out, size=7) == first
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for change in ({"size": 8}, {"format": "parquet"}, {"name": "other"}):
        with pytest.raises(FileExistsError, match="holds shards of other records or settings"):
            write_shards(records, out, **({"size": 7} | change))
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    write_shards(records[:20], out, size=8, overwrite=True)
    write_shards(records[:20], tmp_path / "fresh", size=8)
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_folder_of_something_else_is_left_alone(records, tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"holds other files and no index\.json"):
        write_shards(records, tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_records_that_cannot_be_used(records, tmp_path):
    out = tmp_path / "out"
    cases = [
        (dataclasses.replace(records[1], split=None), r"record '../up': split: missing; write one"),
        (dataclasses.replace(records[1], image="a.jpg"), r"image: 'a.jpg' is relative"),
        (records[0], r"record 'a/b': id: stands twice"),
        (dataclasses.replace(records[1], source=""), r"source: expected a non-empty string"),
    ]
    for record, message in cases:
        with pytest.raises(RecordError, match=message):
            write_shards([records[0], record], out)
        assert not any(out.iterdir())
    options = [({"format": "zip"}, "format"), ({"size": 0}, "size"), ({"on_bad_image": "x"}, "on_bad_image")]
    for option, message in options:
        with pytest.raises(ValueError, match=f"{message}: expected"):
            write_shards(records, out, **option)


def test_fractions_make_splits(records, tmp_path):
    from rode_food.source import hash_split

    fractions = {"train": 0.5, "test": 0.5}
    whole = [dataclasses.replace(record, split=None) for record in records]
    written = write_shards(whole, tmp_path / "out", split_fractions=fractions)
    shards = open_shards(tmp_path / "out")
    assert sum(written.records.values()) == 40
    for record in map(shards.record, range(40)):
        assert record.split == hash_split(record.id, fractions)


def test_a_map_spreads_the_shards(records, tmp_path):
    """In any order, with what goes through it only text."""
    seen = []

    def backwards(function, parts):
        for key, lines in reversed(list(parts)):
            assert all(isinstance(line, str) and "\n" not in line for line in lines)
            result = function(lines)
            assert all(isinstance(line, str) and "\n" not in line for line in result)
            seen.append(key)
            yield key, result

    write_shards(records, tmp_path / "a", size=7, map=backwards)
    write_shards(records, tmp_path / "b", size=7)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(seen) == 7


def test_json_of_a_record_without_its_picture_s_path(records, tmp_path):
    write_shards(records[:1], tmp_path / "out", name="x")
    with tarfile.open(tmp_path / "out/x-test-000000.tar") as tar:
        found = json.loads(tar.extractfile("a%2Fb.json").read())
    wanted = record_to_json(records[0])
    del wanted["image"]
    assert found == wanted


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_lines_of_the_docs(records, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[3] / "docs/shards.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 2
    write_shards(records, tmp_path / "food", name="food", size=7)
    write_shards(records, tmp_path / "other", name="food", size=7, format="parquet")
    for path in (tmp_path / "other").glob("*.parquet"):
        path.rename(tmp_path / "food" / path.name)
    monkeypatch.chdir(tmp_path)
    wanted = sorted(record.id for record in records if record.split == "train")
    names: dict = {}
    exec(blocks[0], names)
    assert sorted(row["json"]["id"] for row in names["tars"]) == wanted
    assert sorted(row["id"] for row in names["rows"]) == wanted
    exec(blocks[1], names)
    assert sorted(line.rsplit(" (24, 24)", 1)[0] for line in capsys.readouterr().out.splitlines()) == [
        f"{id}" for id in wanted
    ]


@pytest.mark.data
@pytest.mark.parametrize("format", FORMATS)
def test_real_photographs(rode_data, tmp_path, format):
    """All of them: records, bytes and pixels are those of the loose files."""
    from rode.vlm import open_image
    from rode_food import read_records
    from rode_food.convert import convert

    convert("food-photos", rode_data / "food_photos", tmp_path / "records.jsonl", on_bad_image="skip")
    loose = {record.id: record for record in read_records(tmp_path / "records.jsonl")}
    write_shards(loose.values(), tmp_path / "out", format=format, size=50)
    shards = open_shards(tmp_path / "out")
    shards.verify()
    assert len(shards) == len(loose) > 150
    for sample, record in enumerate(map(shards.record, range(len(shards)))):
        assert without_image(record) == without_image(loose[record.id])
        with open_picture(record.image) as file:
            assert file.read() == Path(loose[record.id].image).read_bytes()
        if sample % 20 == 0:
            assert open_image(record.image).tobytes() == open_image(loose[record.id].image).tobytes()
