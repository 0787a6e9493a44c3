"""docs/settings.md is what the dataclasses say, and names every key with its type, its default and a meaning."""

from __future__ import annotations

import dataclasses

import pytest

import settings_page
from rode.training.experiment import Experiment, TrainingConfig
from rode.tuner import RodeConfig
from rode.tuner.fields import RodeFields
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.settings import UnifoodSettings

TEXT = settings_page.PAGE.read_text(encoding="utf-8")


def test_the_page_is_up_to_date() -> None:
    assert settings_page.page() == TEXT, (
        "run PYTHONPATH=python python tests/support/settings_page.py, and look at what it changes"
    )


@pytest.mark.parametrize("top", [UnifoodSettings, Experiment])
def test_every_key_has_a_meaning(top: type) -> None:
    for prefix, part in settings_page.parts(top):
        docs = settings_page.field_docs(part)
        assert list(docs) == [field.name for field in dataclasses.fields(part)], prefix
        assert all(docs.values()), (
            f"{prefix}: no meaning for {[name for name, text in docs.items() if not text]}"
        )


def test_every_field_of_an_adapter_has_a_meaning() -> None:
    own = {field.name for field in dataclasses.fields(RodeFields)} - {
        field.name for field in dataclasses.fields(RodeFields.__mro__[1])
    }
    own -= {"belongs_to"}  # nobody's choice: saving writes it
    assert own <= settings_page.args_docs(RodeConfig).keys()


def test_rows_by_hand() -> None:
    found = {
        row[0]: row for row in settings_page.rows(LabelSettings, settings_page.field_docs(LabelSettings))
    }
    assert found["mode"][1:3] == ("`live`, `batch`", "`live`")
    assert found["budget"][1:3] == ("number or null", "`null`")
    assert found["batch_bytes"][2] == "`90000000`"
    trained = {
        row[0]: row for row in settings_page.rows(TrainingConfig, settings_page.field_docs(TrainingConfig))
    }
    assert trained["betas"][1:3] == ("list of number", "`[0.9, 0.95]`")
    assert trained["fsdp"][1] == "mapping to anything or null"
    assert [prefix for prefix, _ in settings_page.parts(Experiment)] == [
        "", "model", "data", "data.sources[i]", "training", "evaluation"
    ]  # fmt: skip
    assert "| `path` | text |  | Checkpoint directory, or hub name" in TEXT
    assert "| `gate` | text | `relu` | what becomes of the logits." in TEXT
