"""A person's decisions, sample by sample: `decisions.json`, {"id": "accept" or "reject"}."""

from __future__ import annotations

import json
from pathlib import Path

from rode_food.atomic import replacing

FILE = "decisions.json"
WORDS = ("accept", "reject")


def check_decisions(value: object, where: str) -> dict[str, str]:
    """`value` as decisions.

    Raises:
        ValueError: if it is none; one line that begins with `where`.
    """
    if not isinstance(value, dict):
        raise ValueError(
            f'{where}: expected an object like {{"dish_1": "accept"}}, got {type(value).__name__}'
        )
    for id, word in value.items():
        if word not in WORDS:
            raise ValueError(f"{where}: {id}: expected accept or reject, got {word!r}"[:200])
    return value


def read_decisions(folder: Path) -> dict[str, str]:
    """The decisions in a folder; none where the file is not there.

    Raises:
        ValueError: for a file that holds something else; it is left as it is.
    """
    path = folder / FILE
    try:
        return check_decisions(json.loads(path.read_text(encoding="utf-8")), str(path))
    except FileNotFoundError:
        return {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON: {error}; mend it, or move it away to begin anew") from None


def write_decisions(folder: Path, decisions: dict[str, str]) -> None:
    """Aside, then renamed."""
    with replacing(folder / FILE) as out:
        json.dump(decisions, out, ensure_ascii=False, indent=0, sort_keys=True)
        out.write("\n")
