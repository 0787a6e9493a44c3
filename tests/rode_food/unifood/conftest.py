"""What the builder's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rode_food.unifood.engines import LocalEngine
from rode_food.unifood.settings import SourceSettings, UnifoodSettings
from rode_food.unifood.stage import Stage


def small_settings(*paths: Path, kind: str = "records", **select: Any) -> UnifoodSettings:
    """Settings of a small build from records' files; categories of two titles are enough."""
    settings = UnifoodSettings(sources=[SourceSettings(kind, str(path)) for path in paths])
    settings.categorise.min_count = 2
    for name, value in select.items():
        assert hasattr(settings.select, name), name
        setattr(settings.select, name, value)
    return settings


@pytest.fixture
def stage(tmp_path: Path) -> Callable[..., Stage]:
    """stage(name, settings, source=None, **fields): a stage in a folder of its own, on one worker, without bars."""

    def make(name: str, settings: UnifoodSettings, source: Path | None = None, **fields: Any) -> Stage:
        folder = fields.pop("folder", tmp_path / name)
        folder.mkdir(parents=True, exist_ok=True)
        return Stage(
            name, folder, source, settings, fields.pop("engine", LocalEngine()), progress=False, **fields
        )

    return make
