"""The parser of ingredient lines with its tagger, or a skip that says what is missing."""

from __future__ import annotations

import pytest

from rode_food.usda import Estimator
from tagger import need_tagger
from tiny_usda import tiny_common, tiny_table


@pytest.fixture
def parser() -> None:
    need_tagger()


@pytest.fixture
def tiny(parser: None) -> Estimator:
    """Over the made-up foods."""
    return Estimator(tiny_table(), "recipe", tiny_common())
