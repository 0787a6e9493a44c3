"""Types of parsers and options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TypeAlias, TypedDict

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The place to which a command adds its parser: what `ArgumentParser.add_subparsers` gives."""


class ParserOptions(TypedDict):
    """Keyword arguments of every command's parser."""

    formatter_class: type[argparse.HelpFormatter]
    parents: Sequence[argparse.ArgumentParser]


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


positive.__name__ = "number of at least 1"  # what argparse calls it in its message
