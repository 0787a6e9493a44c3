"""The review page: one HTML file with everything in it, that works from the file system and over `rode data review`."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from importlib import resources

from rode_food.atomic import replacing

_ENTRIES = "/*ENTRIES*/"
_DECISIONS = "/*DECISIONS*/"


def _inside_script(text: str) -> str:
    """JSON that no browser takes for the end of its script."""
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def write_page(path: str | os.PathLike[str], entries: Iterable[str], decisions: Mapping[str, str]) -> None:
    """Writes the page, entry by entry.

    Args:
        path: of the page.
        entries: JSON objects as `golden.check.page_lines` makes them.
        decisions: what was decided already.
    """
    template = (resources.files("rode_food.unifood.golden") / "review.html").read_text(encoding="utf-8")
    before, after = template.split(_ENTRIES)
    with replacing(path) as out:
        out.write(before)
        for number, entry in enumerate(entries):
            out.write(("" if number == 0 else ",\n") + _inside_script(entry))
        out.write(after.replace(_DECISIONS, _inside_script(json.dumps(dict(decisions), ensure_ascii=False))))
