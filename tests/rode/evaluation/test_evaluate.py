"""Evaluation: what is written, and that metrics come from it alone."""

from __future__ import annotations

import json

import pytest
from peft import get_peft_model
from torch import nn

from rode import RodeConfig
from rode.evaluation.evaluate import evaluate, evaluation_examples, format_scores, rescore
from rode_food.source import Source
from rode_food.vocabulary import Vocabulary
from tiny_llava import tiny_model, tiny_processor


@pytest.fixture
def held_out(food):
    return evaluation_examples([Source(str(food / "records.jsonl"))], "test")


def test_examples_are_each_source_once(food, held_out):
    source = Source(str(food / "records.jsonl"), tasks=("category", "nutrition"), weight=0.25)
    assert len(held_out) == 4 * 4
    assert [e.record_id for e in evaluation_examples([source], "test")] == [
        f"dish{i}" for i in (12, 12, 13, 13, 14, 14, 15, 15)
    ]
    assert len(evaluation_examples([source, source], "test", limit=3)) == 6


def test_a_model_that_is_always_right(held_out, tmp_path, monkeypatch):
    truths = {(e.images, e.question): e.answer for e in held_out}
    monkeypatch.setattr("rode.evaluation.generate.answer", lambda model, processor, images, questions, **_: [
        truths[pair] for pair in zip(images, questions, strict=True)
    ])  # fmt: skip
    scores = evaluate(nn.Identity(), None, held_out, tmp_path)
    assert list(scores) == ["all", "right", "left"] or list(scores) == ["all", "left", "right"]
    for columns in scores.values():
        assert columns["ingredient_iou"] == columns["category_accuracy"] == columns["parse_rate"] == 100
        assert columns["sacrebleu"] == pytest.approx(100)
        assert columns["pmae"] == 0
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(r["id"], r["task"], r["answer"]) for r in rows] == [
        (e.record_id, e.task, e.answer) for e in held_out
    ]


def test_metrics_come_from_the_predictions_alone(held_out, tmp_path):
    model = get_peft_model(tiny_model(), RodeConfig(ranks=(2, 3)))
    scores = evaluate(
        model,
        tiny_processor(),
        held_out,
        tmp_path,
        prompt="vicuna",
        max_new_tokens=4,
        batch_size=3,
        progress=False,
    )
    written = (tmp_path / "metrics.json").read_text()
    assert json.loads(written) == scores
    (tmp_path / "metrics.json").unlink()
    assert rescore(tmp_path / "predictions.jsonl") == scores
    assert (tmp_path / "metrics.json").read_text() == written
    gates = json.loads((tmp_path / "gates.json").read_text())["layers"]
    assert len(gates) == 4
    # each question's prompt holds four image tokens; text goes on token by token
    assert gates[0]["tokens"]["image"] == 4 * len(held_out)
    assert not list(tmp_path.glob("*.tmp"))


def test_without_a_router_no_gates(held_out, tmp_path):
    for name, model in (
        ("base", tiny_model()),
        ("lora", get_peft_model(tiny_model(), RodeConfig(ranks=(2,), gate="none"))),
    ):
        evaluate(
            model,
            tiny_processor(),
            held_out[:2],
            tmp_path / name,
            prompt="vicuna",
            max_new_tokens=2,
            progress=False,
        )
        assert not (tmp_path / name / "gates.json").exists()


def test_a_vocabulary_merges_names(held_out, tmp_path, monkeypatch):
    monkeypatch.setattr("rode.evaluation.generate.answer", lambda *_, **__: ["fried rices"] * len(held_out))
    vocabulary = Vocabulary({"rice": {"rice": 2, "fried_rices": 1}, "leaf": {"leaf": 2}})
    scores = evaluate(nn.Identity(), None, held_out, tmp_path, vocabulary=vocabulary)
    assert json.loads((tmp_path / "metrics.json").read_text()) == scores
    # rice of {rice, leaf} for each
    assert scores["all"]["ingredient_iou"] == 50
    assert scores["all"]["ingredient_vocabulary"] == vocabulary.name
    written = (tmp_path / "predictions.jsonl").read_text()
    assert "fried rices" in written
    plain = rescore(tmp_path / "predictions.jsonl")["all"]
    assert plain["ingredient_iou"] == 0
    assert "ingredient_vocabulary" not in plain
    assert rescore(tmp_path / "predictions.jsonl", vocabulary) == scores


def test_errors(tmp_path):
    with pytest.raises(ValueError, match="expected at least one"):
        evaluate(nn.Identity(), None, [], tmp_path)
    with pytest.raises(FileNotFoundError, match="no such predictions file"):
        rescore(tmp_path / "none.jsonl")
    (tmp_path / "p.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no predictions in it"):
        rescore(tmp_path / "p.jsonl")
    (tmp_path / "p.jsonl").write_text("{")
    with pytest.raises(ValueError, match=r"p.jsonl:1: not JSON"):
        rescore(tmp_path / "p.jsonl")


def test_the_table():
    scores = {
        "all": {"n_recipe": 3, "sacrebleu": 1.234, "sacrebleu_signature": "sig", "pmae_parsed": None},
        "a": {"n_recipe": 1, "sacrebleu": 10.0, "sacrebleu_signature": "sig", "pmae_parsed": 2.0},
        "b": {"n_recipe": 2},
    }
    assert format_scores(scores).splitlines() == [
        "              all      a  b",
        "n_recipe        3      1  2",
        "sacrebleu    1.23  10.00  -",
        "pmae_parsed     -   2.00  -",
        "sacrebleu_signature: sig",
    ]
    assert format_scores({"all": {"x": 1.0}, "only": {"x": 1.0}}).splitlines() == ["    all", "x  1.00"]
