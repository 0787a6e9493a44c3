"""Dataclasses from plain values, as YAML or JSON gives them: every key and every type checked."""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import yaml

from rode_food.yaml_text import parse_yaml

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


class SettingsError(ValueError):
    """Settings that cannot be used. One line: which key, what it got, what was wanted."""


def did_you_mean(word: str, known: typing.Iterable[str]) -> str:
    """The end of an error message about an unknown word."""
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def _describe(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join("null" if h is type(None) else _describe(h) for h in get_args(hint))
    if get_origin(hint) is list:
        return f"a list of {_describe(get_args(hint)[0])}"
    if get_origin(hint) is dict or is_dataclass(hint):
        return "a mapping"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]


def _convert(hint: Any, value: object, where: str) -> Any:
    """`value`, as YAML gave it, checked against a type hint and made into it."""
    if hint is Any:
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        return build(hint, value, where)
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [h for h in get_args(hint) if h is not type(None)]
        return None if value is None else _convert(inner[0], value, where)
    if origin is list and isinstance(value, list):
        return [_convert(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {key: _convert(get_args(hint)[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is Literal and value in get_args(hint):
        return value
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 3e-4 as text
            number = float(value)
        except (ValueError, OverflowError):
            number = None
        if number is not None and not math.isfinite(number):
            raise SettingsError(f"{where}: expected a finite number, got {value!r}")
        if number is not None:
            return number
    if hint in (int, bool, str) and type(value) is hint:
        return os.path.expanduser(os.path.expandvars(value)) if isinstance(value, str) else value
    raise SettingsError(f"{where}: expected {_describe(hint)}, got {_shown(value)}")


def _shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def refuse_not_finite(value: object, where: str) -> None:
    """Raises SettingsError, naming the key, for a number in plain values that is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingsError(f"{where}: expected a finite number, got {value!r}")
    items: typing.Iterable[tuple[Any, object]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        refuse_not_finite(item, f"{where}.{key}")


def build(cls: type[T], values: object, where: str = "") -> T:
    """A dataclass from plain values, every key and type checked against its fields. Raises SettingsError, naming `where`."""
    prefix = f"{where}." if where else ""
    if not isinstance(values, dict):
        raise SettingsError(f"{where or 'at the top'}: expected a mapping, got {_shown(values)}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise SettingsError(f"{prefix}{key}: no such key; {did_you_mean(str(key), hints)}")
    for f in fields(cls):
        if f.name not in values and f.default is f.default_factory:  # both MISSING: required
            raise SettingsError(f"{prefix}{f.name}: missing; expected {_describe(hints[f.name])}")
    return cls(**{key: _convert(hints[key], value, prefix + key) for key, value in values.items()})


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file, unchecked. Raises SettingsError, naming the file, for anything else in it."""
    try:
        values = parse_yaml(file.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(
            f"{file}: expected UTF-8 text, got other bytes at position {error.start}"
        ) from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{file}: expected a mapping at the top, got {type(values).__name__}")
    return values


def override(values: dict[str, Any], assignment: str) -> None:
    """Applies "key.sub=value" to plain values in place; the value is YAML. Raises SettingsError."""
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise SettingsError(f"override {assignment!r}: expected key.sub=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        why = " ".join(str(error).split())
        raise SettingsError(f"override {assignment!r}: {text!r} is not YAML: {why}") from error
    assign(values, key, value, f"override {assignment!r}")


def assign(values: dict[str, Any], key: str, value: Any, where: str) -> None:
    """Sets "key.sub" of plain values in place. Raises SettingsError, naming `where`."""
    *path, last = key.split(".")
    node: Any = values

    def index(part: str) -> Any:
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise SettingsError(f"{where}: {part!r} is no index into a list of {len(node)}")
            return int(part)
        if not isinstance(node, dict):
            raise SettingsError(f"{where}: {part!r} is inside {node!r}, which is no mapping")
        return part

    for part in path:
        at = index(part)
        if isinstance(node, dict) and node.get(at) is None:
            node[at] = {}
        node = node[at]
    node[index(last)] = value
