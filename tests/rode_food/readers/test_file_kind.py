"""A file is called what it is by its content, whatever its name says."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from odd_dishes import picture
from rode.cli import main
from rode_food import read_records
from rode_food.readers import guess_kind
from rode_food.readers.file_kind import file_kind

RECORD = {"id": "a", "source": "s", "conversation": [{"question": "Why?", "answer": "So."}]}
LINES = json.dumps(RECORD).encode() + b"\n" + json.dumps({**RECORD, "id": "b"}).encode() + b"\n"
LLAVA = [{"id": "a", "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}]
MESSAGES = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}


class Bomb:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.jsonl", LINES)
    return out.getvalue()


def tarred() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    return out.getvalue()


def numpy_bytes() -> bytes:
    out = io.BytesIO()
    np.save(out, np.arange(3))
    return out.getvalue()


def encoded(value: object) -> bytes:
    return json.dumps(value).encode()


FILES = {
    "records": (LINES, "JSON lines of records", "records"),
    "records with a mark": (b"\xef\xbb\xbf" + LINES, "JSON lines of records", "records"),
    "records packed": (gzip.compress(b"\xef\xbb\xbf" + LINES), "gzip'ed: JSON lines of records", "records"),
    "records, first line broken": (b'{"id": \n' + LINES, "JSON lines of records", "records"),
    "LLaVA": (encoded(LLAVA), "a LLaVA-instruct array", "llava-instruct"),
    "LLaVA, indented": (json.dumps(LLAVA, indent=2).encode(), "a LLaVA-instruct array", "llava-instruct"),
    "LLaVA packed": (gzip.compress(encoded(LLAVA)), "gzip'ed: a LLaVA-instruct array", "llava-instruct"),
    "LLaVA lines": (encoded(LLAVA[0]) + b"\n", "JSON lines of LLaVA-instruct", "llava-instruct"),
    "messages": (encoded(MESSAGES) + b"\n", "JSON lines of messages", "messages"),
    "messages array": (encoded([MESSAGES]), "a JSON array of messages", "messages"),
    "array of records": (encoded([RECORD]), "a JSON array of records", None),
    "array of objects": (encoded([{"name": "x"}]), "a JSON array of objects", None),
    "array of numbers": (b"[1, 2]", "a JSON array without objects", None),
    "object": (json.dumps(RECORD, indent=1).encode(), "one JSON object over several lines", None),
    "CSV": (b'id,name\n1,soup\n2,"a, b"\n', "a CSV table", None),
    "CSV with semicolons": (b"id;name\n1;soup\n", "a CSV table", None),
    "TSV": (b"id\tname\n1\tsoup\n", "a table with tabs between columns", None),
    "CSV packed": (gzip.compress(b"a,b\n1,2\n"), "gzip'ed: a CSV table", None),
    "pickle": (pickle.dumps([RECORD]), "a pickle", None),
    "old pickle": (pickle.dumps([RECORD], 0), "a pickle", None),
    "zip": (zipped(), "a zip archive", None),
    "tar": (tarred(), "a tar archive", None),
    "tar packed": (gzip.compress(tarred()), "gzip'ed: a tar archive", None),
    "cut gzip": (gzip.compress(LINES)[:30], "a damaged gzip file", None),
    "numpy": (numpy_bytes(), "a NumPy array", None),
    "UTF-16": ("id,name\n".encode("utf-16"), "UTF-16 text", None),
    "empty": (b"", "an empty file", None),
    "blank": (b" \n\n", "an empty file", None),
    "text": (b"Dear reader,\nhow are you?\n", "text", None),
    "Latin-1": ("Käse und Brot\n".encode("latin-1"), "text that is not UTF-8", None),
    "cut Parquet": (b"PAR1\0\0\0", "a damaged Parquet file", None),
    "binary": (b"abc\0def", "binary data of an unknown kind", None),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    data, what, reader = FILES[name]
    path = tmp_path / "records.jsonl"
    path.write_bytes(data)
    found = file_kind(path)
    assert (found.name, found.reader) == (what, reader)
    code = main(["data", "inspect", str(path), "--json", str(tmp_path / "found.json")])
    out = capsys.readouterr().out
    inspected = json.loads((tmp_path / "found.json").read_text())
    if reader is None:
        assert code == 1
        assert out == f"{path}: {what}, 0 records\n{found.advice}\n"
        assert found.advice
        assert (inspected["kind"], inspected["records"]) == (what, 0)
        with pytest.raises(ValueError, match=r"^source: .*records.jsonl is "):
            guess_kind(path)
        return
    assert code == 0
    assert out.startswith(f"{path}: {reader}, {2 if reader == 'records' else 1} records")
    assert guess_kind(path) == inspected["kind"] == reader
    if reader == "records":
        assert found.advice == ""
    else:
        assert f"to convert: rode data convert {reader} {path} records.jsonl" in out


def test_pictures_and_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    assert file_kind(picture(tmp_path / "a.jsonl", 1)).name == "a JPEG picture"
    pyarrow.parquet.write_table(pyarrow.table({"a": [1], "b": ["x"]}), tmp_path / "t")
    found = file_kind(tmp_path / "t")
    assert (found.name, found.reader) == ("a Parquet file", None)
    assert found.advice == "it has the columns a, b; expected messages, and images"
    pyarrow.parquet.write_table(pyarrow.table({"messages": ["x"]}), tmp_path / "t")
    assert file_kind(tmp_path / "t").reader == "messages"


@pytest.mark.parametrize("protocol", range(6))
def test_nothing_is_unpickled(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "records.jsonl"
    path.write_bytes(pickle.dumps([Bomb(mark)], min(protocol, pickle.HIGHEST_PROTOCOL)))
    assert file_kind(path).name == "a pickle"
    assert main(["data", "inspect", str(path)]) == 1
    assert not mark.exists()


def test_nothing_readable_is_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"id": "a"}\n{"id": "b"}\n')
    assert main(["data", "inspect", str(path)]) == 1
    assert "2 x a record that breaks the schema" in capsys.readouterr().out


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_records_are_read_packed_and_marked(tmp_path: Path, pack, mark: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(pack(mark + LINES))
    assert [record.id for record in read_records(path)] == ["a", "b"]


@settings(max_examples=300, deadline=None)
@example(b"\x0b[")
@given(
    st.binary(max_size=300)
    | st.text('[]{}",:a0 \t\r\n\x0b\x0c\x85\xa0\u2028\ufeff', max_size=20).map(str.encode)  # nearly JSON
)
def test_any_bytes_have_a_kind(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    found = file_kind(path)
    assert found.name
    assert found.reader or found.advice
