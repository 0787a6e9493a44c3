"""The library of ingredient lines with its tagger, or a skip that says what is missing."""

from __future__ import annotations

import pytest

from tagger import need_tagger


@pytest.fixture
def parser() -> None:
    need_tagger()
