"""Benchmarks of the operation against plain PyTorch: `python -m benchmarks`. A result is checked before anything is counted."""

from __future__ import annotations

import json
from pathlib import Path


def write_json(path: str, value: object) -> None:
    """Written aside, then renamed."""
    target = Path(path)
    aside = target.with_name(target.name + ".part")
    aside.write_text(json.dumps(value, indent=2) + "\n")
    aside.replace(target)
