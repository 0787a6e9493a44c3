"""Files that appear whole or not at all, and JSON as it is laid out."""

from __future__ import annotations

import json
import math
import os

import pytest

from rode_food.atomic import json_text, replacing, write_json, written_aside

NESTED = {
    "name": "crêpe",
    "empty": {},
    "leaf": {"rank": 2, "gates": [0.25, None]},
    "rows": [[1, 2], [3, [4]]],
    "runs": [{"seed": 0}, {"seed": 1, "versions": {"rode": "0.1.0"}}],
    "maps": {"all": {"blocks": [0], "gates": [[0.5]]}},
}
LAID_OUT = """\
{
 "name": "crêpe",
 "empty": {},
 "leaf": {"rank": 2, "gates": [0.25, null]},
 "rows": [[1, 2], [3, [4]]],
 "runs": [
  {"seed": 0},
  {
   "seed": 1,
   "versions": {"rode": "0.1.0"}
  }
 ],
 "maps": {
  "all": {
   "blocks": [0],
   "gates": [[0.5]]
  }
 }
}
"""


def test_json_is_laid_out_a_key_a_line():
    assert json_text(NESTED) == LAID_OUT
    assert json.loads(LAID_OUT) == NESTED
    assert json_text({"a": 1}) == '{\n "a": 1\n}\n'  # the outermost object always
    assert json_text([{"step": 1}, {"step": 2}]) == '[\n {"step": 1},\n {"step": 2}\n]\n'
    assert [json_text(value) for value in ({}, [], 3)] == ["{}\n", "[]\n", "3\n"]


def test_json_takes_what_python_writes():
    assert json_text({1: (2, 3)}) == '{\n "1": [2, 3]\n}\n'
    assert json_text([1e-07, 0.1 + 0.2, 2**70]) == "[1e-07, 0.30000000000000004, 1180591620717411303424]\n"
    assert json_text([math.inf]) == "[Infinity]\n"
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text([math.nan], allow_nan=False)


def test_write_json(tmp_path):
    write_json(tmp_path / "new" / "a.json", NESTED)
    assert (tmp_path / "new" / "a.json").read_text(encoding="utf-8") == LAID_OUT
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "new" / "a.json", math.nan, allow_nan=False)
    assert os.listdir(tmp_path / "new") == ["a.json"]  # what was there stays, and nothing else is left
    assert (tmp_path / "new" / "a.json").read_text(encoding="utf-8") == LAID_OUT


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "folder" / "a.bin"
    with written_aside(path) as aside:
        aside.write_bytes(b"new")
        assert aside.parent == path.parent
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["a.bin"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "model"
    left = tmp_path / f".model.{os.getpid()}.tmp"
    left.mkdir()
    (left / "old").write_text("of a killed process")
    with written_aside(path) as aside:
        assert aside == left
        (aside / "deep").mkdir(parents=True)
        (aside / "deep" / "a.txt").write_text("new")
        assert not path.exists()
    assert [str(file.relative_to(path)) for file in path.rglob("*")] == ["deep", "deep/a.txt"]
    assert os.listdir(tmp_path) == ["model"]


def stop_halfway(path, name):
    with written_aside(path) as aside:
        (aside / name).parent.mkdir(exist_ok=True)
        (aside / name).write_text("half")
        raise RuntimeError("halfway")


def test_a_failure_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for name in ("", "half"):  # a file, a folder
        with pytest.raises(RuntimeError, match="halfway"):
            stop_halfway(path, name)
    with pytest.raises(OSError) as error, replacing(path):
        raise OSError(28, "No space left on device")  # as a failed write says it: without a name
    assert (error.value.errno, error.value.filename) == (28, str(path))
    with pytest.raises(FileNotFoundError), written_aside(path):
        pass  # nothing was written
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_does_not_replace_one_that_holds_something(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("old")
    with pytest.raises(OSError), written_aside(tmp_path / "model") as aside:
        aside.mkdir()
    assert (tmp_path / "model" / "mine").read_text() == "old"
    assert os.listdir(tmp_path) == ["model"]
