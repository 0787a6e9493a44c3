"""NLTK's tagger for tests: from RODE_DATA, or wherever it is installed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TAGGER = "taggers/averaged_perceptron_tagger_eng"


def need_tagger() -> None:
    """Skips the test where ingredient-parser-nlp or its tagger is not there; nothing is downloaded."""
    folder = Path(os.environ.get("RODE_DATA", "")).resolve() / "nltk_data"
    if "RODE_DATA" in os.environ and folder.is_dir() and "NLTK_DATA" not in os.environ:
        os.environ["NLTK_DATA"] = str(folder)  # for this process's children as well
    nltk = pytest.importorskip("nltk", reason="ingredient-parser-nlp is not installed")
    pytest.importorskip("nltk.data")
    if "NLTK_DATA" in os.environ and os.environ["NLTK_DATA"] not in nltk.data.path:
        nltk.data.path.append(os.environ["NLTK_DATA"])
    try:
        nltk.data.find(TAGGER)
    except LookupError:
        pytest.skip("NLTK's averaged_perceptron_tagger_eng is not here: set NLTK_DATA or RODE_DATA")
    pytest.importorskip("ingredient_parser")
