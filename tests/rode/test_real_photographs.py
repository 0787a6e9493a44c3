"""Real photographs the whole way: convert, train some steps, evaluate, answer; with a tiny random model."""

from __future__ import annotations

import json

import pytest

from rode.cli import main
from rode_food import read_records

pytestmark = pytest.mark.data

CONFIG = """
name: photographs
output_dir: {out}/run
model: {{path: {model}, device: cpu, prompt: vicuna, vision_features: disk, features_dir: {out}/features}}
data: {{sources: [{{path: {out}/records.jsonl}}], on_bad_record: skip}}
adapter: {{ranks: [2, 4, 8, 16], target_modules: ".*language_model.*_proj"}}
training:
  learning_rate: 1.0e-2
  projector_learning_rate: 1.0e-2
  batch_size: 4
  gradient_accumulation: 2
  warmup_steps: 2
  schedule: constant
  max_steps: 20
  max_length: 400
  questions_per_picture: 3
  group_by_length: true
  logging_steps: 1
evaluation: {{max_new_tokens: 8, batch_size: 16}}
"""


def test_from_photographs_to_metrics(rode_data, llava_dir, tmp_path, capsys):
    records = tmp_path / "records.jsonl"
    assert (
        main(
            [
                "data",
                "convert",
                "food-photos",
                str(rode_data / "food_photos"),
                str(records),
                "--on-bad-image",
                "skip",
            ]
        )
        == 0
    )
    held_out = list(read_records(records, split="test"))
    assert len(list(read_records(records))) > 150
    assert len(held_out) > 5
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(out=tmp_path, model=llava_dir))

    assert main(["train", str(config), "--quiet"]) == 0
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 20
    assert sum(losses[-3:]) < sum(losses[:3]) - 1.5  # half a nat a token: it learns what letters are like
    assert history[-1]["truncated_answers"] > 0  # recipes in a byte-level vocabulary

    capsys.readouterr()
    assert main(["evaluate", str(config), "--quiet"]) == 0
    assert "ingredient_iou" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert metrics["all"]["n_ingredients"] == sum(bool(record.ingredients) for record in held_out)
    assert metrics["all"]["n_recipe"] == sum(bool(record.instructions) for record in held_out)
    assert 0 <= metrics["all"]["rouge_l"] <= 100
    assert set(metrics) == {"all", *(record.source for record in held_out)}
    gates = json.loads((tmp_path / "run" / "evaluation" / "gates.json").read_text())["layers"]
    rates = [rate for layer in gates for rate in layer["open_rate"]["text"]]
    assert len(rates) == 2 * 7 * 4
    assert 0 < sum(rates) / len(rates) < 1

    photograph = held_out[0].image
    assert (
        main(
            [
                "generate",
                "--adapter",
                str(tmp_path / "run"),
                "--image",
                photograph,
                "--task",
                "ingredients",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["image"] == photograph
