"""docs/labelling.md: its settings are accepted, and the server that it names answers from a table of foods."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from label_job import dish, make_job, stage_of
from rode_food.convert import convert
from rode_food.records import read_records
from rode_food.settings import build
from rode_food.unifood.label.run import run
from rode_food.unifood.label.settings import LabelSettings
from vision_answers import foods_of
from vision_server import VisionServer

PAGE = (Path(__file__).parents[4] / "docs" / "labelling.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_settings(block):
    build(LabelSettings, yaml.safe_load(block)["label"], "label").check()


def test_settings_that_are_named_exist():
    known = {field.name for field in dataclasses.fields(LabelSettings)}
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", PAGE))
    other = {
        "lost_at_most",
        "cost_at_most",
        "token_limit_exceeded",
        "json_schema",
        "json_object",
        "response_format",
    }
    assert named - other <= known


def test_answers_from_a_table(tmp_path):
    table = tmp_path / "foods.csv"
    table.write_text(
        'description,kcal,fat_g,protein_g,carb_g\n"Rice, white, raw",360,0.6,6.6,79.3\n"Butter, salted",717,81.1,0.9,0.1\n'
    )
    folder = make_job(tmp_path, records=[dish(tmp_path, 1, "200 g white rice", "1 tbsp butter")])
    with VisionServer(foods_of(table)) as server:
        run(stage_of(folder, base_url=server.url))
    rice, butter = next(read_records(folder / "label" / "records.jsonl")).ingredients
    assert (rice.mass, rice.nutrition.energy, rice.nutrition.carb) == (200, 720, 158.6)
    assert (butter.mass, butter.nutrition.fat) == (60, pytest.approx(48.66))


@pytest.mark.data
def test_real_photographs(rode_data, tmp_path):
    """A dozen home recipes, answered from USDA's table; live and batch mode give the same bytes."""
    convert("food-photos", rode_data / "food_photos", tmp_path / "all.jsonl")
    records = list(read_records(tmp_path / "all.jsonl"))[::17]
    folder = make_job(tmp_path, records=records)
    with VisionServer(foods_of(rode_data / "usda" / "sr28_foods.csv")) as server:
        settings = dict(base_url=server.url, timeout=30.0, image_side=336)
        report = run(stage_of(folder, **settings))
        run(stage_of(folder, into="batch", mode="batch", **settings))
    assert report["labelled"] >= len(records) - 1
    for name in ("records.jsonl", "set_aside.jsonl"):
        assert (folder / "label" / name).read_bytes() == (folder / "batch" / name).read_bytes()
    for record in read_records(folder / "label" / "records.jsonl"):
        assert all(i.nutrition.complete and i.mass == i.nutrition.mass for i in record.ingredients)
