"""docs/settings.md, made from the dataclasses: `PYTHONPATH=python python tests/support/settings_page.py` writes it.

Each row's meaning is the text below the field in its dataclass; of an adapter, what `RodeConfig` says under `Args`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
Row = tuple[str, str, str, str]
"""Key, type, default, meaning."""

_TOP = """\
# Settings: every key of the two kinds of files

This page is made from the code (`PYTHONPATH=python python tests/support/settings_page.py`); a test fails when it is out of date.
A key without a default is needed. An unknown key, a wrong type or an impossible value is an error that names it. `KEY=VALUE` after
the file on the command line changes a key for one run.

"""
_BUILD = """\
## A build of a data set: `rode data build-unifood SETTINGS.yaml DIR`

[unifood.md](unifood.md) says what the stages do. [configs/build/unifood.yaml](../configs/build/unifood.yaml) is an example.

"""
_TRAIN = """\
## An experiment: `rode train CONFIG.yaml`, `rode evaluate`, `rode generate`

[training.md](training.md) goes through the keys that are worth knowing. A config may begin with `extends: other.yaml`
([training.md](training.md#the-config)) and may hold a [`sweep`](training.md#sweeps).

"""
_ADAPTER = """\
### `adapter`

These are the fields of `rode.tuner.RodeConfig`. With `preset: NAME` only those that differ from a preset's need to be given
([presets.md](presets.md)). With `method: peft` or `method: moe-llava` the fields are those of PEFT's own configuration, or of
MoE-LLaVA's.

"""


def field_docs(cls: type) -> dict[str, str]:
    """Field -> the text that stands below it in the class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for field, below in zip(body.body, [*body.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and below.value.value
            docs[field.target.id] = " ".join(text.split()) if isinstance(text, str) else ""
    return docs


def args_docs(cls: type) -> dict[str, str]:
    """Name -> text of the entries under `Args:` in a class's docstring."""
    text = inspect.getdoc(cls) or ""
    found = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    docs: dict[str, str] = {}
    for name, rest in re.findall(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", found[1] if found else "", re.MULTILINE):
        docs[name] = " ".join(rest.split())
    return docs


def type_of(hint: Any) -> str:
    """A type in words, as error messages have them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is list or origin is tuple or origin is set:
        return f"list of {type_of(args[0])}"
    if origin is dict:
        return f"mapping to {type_of(args[1])}"
    if args:
        return " or ".join(dict.fromkeys(map(type_of, args)))
    words = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}
    return words.get(hint, "mapping")


def default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    if isinstance(value, float) and value == int(value) and value < 1e15:
        value = int(value)
    return f"`{json.dumps(value, ensure_ascii=False)}`" if not isinstance(value, str) else f"`{value}`"


def rows(cls: type, docs: dict[str, str]) -> list[Row]:
    """A row for each field that is no part with a table of its own."""
    hints = typing.get_type_hints(cls)
    return [
        (field.name, type_of(hints[field.name]), default_of(field), docs[field.name])
        for field in dataclasses.fields(cls)
        if field.name in docs and not part_of(hints[field.name])
    ]


def part_of(hint: Any) -> type | None:
    """The dataclass of a part, or of a list's entries."""
    inner = typing.get_args(hint)[0] if typing.get_origin(hint) is list else hint
    return inner if dataclasses.is_dataclass(inner) and isinstance(inner, type) else None


def parts(cls: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """("data", DataConfig), ("data.sources[]", SourceConfig), ...: the class itself first, then what is in it."""
    yield prefix, cls
    for name, hint in typing.get_type_hints(cls).items():
        part = part_of(hint)
        if part is not None:
            many = "[i]" if typing.get_origin(hint) is list else ""
            yield from parts(part, f"{prefix}.{name}{many}".strip("."))


def table(found: list[Row]) -> str:
    def cell(text: str) -> str:
        return re.sub(r"\bNone\b", "null", text).replace("|", "\\|")

    lines = ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
    lines += [
        f"| `{key}` | {cell(type)} | {cell(default)} | {cell(text)} |" for key, type, default, text in found
    ]
    return "\n".join(lines) + "\n"


def sections(cls: type) -> str:
    out = []
    for prefix, part in parts(cls):
        found = rows(part, field_docs(part))
        if not found:
            continue
        title = f"### `{prefix}`" if prefix else "### At the top"
        about = (inspect.getdoc(part) or "").partition("\n\n")[0] if prefix else ""
        out.append("\n".join([title, "", *([about, ""] if about else []), table(found)]))
    return "\n".join(out)


def page() -> str:
    """The whole page."""
    from rode.training.experiment import Experiment
    from rode.tuner import RodeConfig
    from rode_food.unifood.settings import UnifoodSettings

    adapter = rows(RodeConfig, args_docs(RodeConfig))
    return "\n".join(
        [_TOP + _BUILD + sections(UnifoodSettings), _TRAIN + sections(Experiment), _ADAPTER + table(adapter)]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
