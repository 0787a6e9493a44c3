"""What every test folder shares."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def lines_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Ingredient lines that tests read are kept beside them, for their child processes too, and not in the user's cache."""
    os.environ["RODE_LINES_CACHE"] = str(tmp_path_factory.mktemp("lines") / "lines.sqlite")


@pytest.fixture
def tagger() -> None:
    """The library of ingredient lines with its tagger, or a skip that says what is missing."""
    from tagger import need_tagger

    need_tagger()


@pytest.fixture(scope="session")
def rode_data() -> Path:
    """The folder of real photographs and nutrient tables; without it the test is skipped."""
    folder = os.environ.get("RODE_DATA")
    if not folder:
        pytest.skip("RODE_DATA is not set: it names a folder with food_photos/ and nutrition5k/")
    path = Path(folder).resolve()
    assert path.is_dir(), f"RODE_DATA={folder} is not a folder"
    return path


@pytest.fixture(scope="session")
def food(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """records.jsonl with 12 training and 4 test records of two sources, and their pictures."""
    from tiny_llava import DISHES, draw

    folder = tmp_path_factory.mktemp("food")
    with (folder / "records.jsonl").open("w") as out:
        for i in range(16):
            draw(folder / f"{i}.png", (15 * i, 255 - 15 * i, 100))
            record = {
                "id": f"dish{i}",
                "image": f"{i}.png",
                "source": "left" if i % 2 else "right",
                "category": DISHES[i % 3],
                "ingredients": [{"name": "rice"}, {"name": f"leaf {i % 2}"}],
                "instructions": ["Boil it in plenty of salted water."],
                "nutrition": {"mass": 100, "energy": 200, "fat": 3, "protein": 4, "carb": 5 + i},
                "split": "train" if i < 12 else "test",
            }
            out.write(json.dumps(record) + "\n")
    return folder
