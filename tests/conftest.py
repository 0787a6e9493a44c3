"""What every test folder shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def rode_data() -> Path:
    """The folder of real photographs and nutrient tables; without it the test is skipped."""
    folder = os.environ.get("RODE_DATA")
    if not folder:
        pytest.skip("RODE_DATA is not set: it names a folder with food_photos/ and nutrition5k/")
    path = Path(folder).resolve()
    assert path.is_dir(), f"RODE_DATA={folder} is not a folder"
    return path
