"""YAML that is refused: keys twice, aliases and nesting that blow up, bytes that are no text."""

from __future__ import annotations

import time

import pytest
import yaml

from rode_food.settings import SettingsError, override, read_mapping
from rode_food.yaml_text import MAX_DEPTH, parse_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGED = "a0: &a0 {x0: 1}\n" + "".join(
    f"a{i}: &a{i} {{x{i}: 1, <<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands there twice, in lines 1 and 3; remove one"),
        ("a: {b: 1, b: 2}", "the key 'b' stands there twice, in lines 1 and 1"),
        ("x:\n- a: 1\n  a: 1\n", "the key 'a' stands there twice, in lines 2 and 3"),
        (BOMB, "at most 100000 values, got more once its aliases are followed"),
        (MERGED, "at most 100000 values, got more once its aliases are followed"),
        ("a: &a [*a]", "an alias stands inside what it stands for"),
        ("a: &a {b: *a}", "an alias stands inside what it stands for"),
        ("a: " + "[" * 100_000, f"at most {MAX_DEPTH} levels"),
        ("a: " + "{b: " * 1000 + "1" + "}" * 1000, f"at most {MAX_DEPTH} levels"),
        ("a: 2026-13-45", "month must be in 1..12"),
        ("a: " + "9" * 5000, "integer string conversion"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: [1", "expected"),
    ],
)
def test_what_is_refused_quickly(tmp_path, text, words):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    start = time.process_time()
    with pytest.raises(SettingsError) as caught:
        read_mapping(file)
    assert time.process_time() - start < 5
    message = str(caught.value)
    assert message.startswith(f"{file}: not YAML: ")
    assert words in message
    assert "\n" not in message


def test_what_is_kept():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: [*a, *a]\n1: 2\n'1': 3") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 3, "y": 2},
        "c": [{"x": 1, "y": 2}] * 2,
        1: 2,
        "1": 3,
    }
    assert parse_yaml("") is None
    assert yaml.safe_load("a: 1\na: 2") == {"a": 2}  # others' use of PyYAML is left alone


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(SettingsError, match=r"a.yaml: expected UTF-8 text, got other bytes at position 9"):
        read_mapping(file)
    file.write_bytes(b"\xef\xbb\xbfname: a\n")  # the mark that Windows puts in front
    assert read_mapping(file) == {"name": "a"}
    file.write_bytes("name: a".encode("utf-16"))
    with pytest.raises(SettingsError, match="expected UTF-8 text"):
        read_mapping(file)


def test_an_override_is_held_to_the_same():
    with pytest.raises(
        SettingsError, match=r"override 'a=\{b: 1, b: 2\}': .* the key 'b' stands there twice"
    ):
        override({}, "a={b: 1, b: 2}")


def test_a_long_value_is_cut_in_the_message():
    from rode_food.settings import build
    from rode_food.source import Source

    with pytest.raises(SettingsError) as caught:
        build(Source, {"path": "a", "weight": ["x" * 10_000]})
    assert len(str(caught.value)) < 300
