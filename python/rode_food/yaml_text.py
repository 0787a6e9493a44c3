"""YAML from a file or a command line: plain values, every key once, bounded in depth and size."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

MAX_DEPTH = 50
MAX_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which keeps the last of two equal keys, and follows aliases and nesting without end."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.YAMLError(f"expected at most {MAX_DEPTH} levels inside one another, got more")
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None and _expanded(node, {}) > MAX_NODES:
            raise yaml.YAMLError(
                f"expected at most {MAX_NODES} values, got more once its aliases are followed"
            )
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if isinstance(node, yaml.MappingNode):
            seen: dict[tuple[str, str], yaml.Node] = {}
            for key, _ in node.value:  # before merges ("<<"), whose keys may be stated again
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (key.tag, key.value) in seen:
                    lines = [n.start_mark.line + 1 for n in (seen[key.tag, key.value], key)]
                    raise yaml.YAMLError(
                        f"the key {key.value!r} stands there twice, in lines {lines[0]} and {lines[1]}; remove one"
                    )
                seen[key.tag, key.value] = key
        return super().construct_mapping(node, deep)


def _expanded(node: yaml.Node, known: dict[int, int | None]) -> int:
    """The number of values in a node with each alias counted as all that it stands for."""
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise yaml.YAMLError("an alias stands inside what it stands for")
        return count
    known[id(node)] = None
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        below = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    known[id(node)] = count = 1 + sum(_expanded(part, known) for part in below)
    return count


def parse_yaml(text: str) -> Any:
    """Plain values from YAML.

    Raises:
        yaml.YAMLError: it is not YAML, has a key twice, or is too deep or too large; in words.
    """
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except (ValueError, OverflowError) as error:  # a date or a number that is none
        raise yaml.YAMLError(str(error)) from error
