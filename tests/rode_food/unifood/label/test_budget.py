"""What a job costs: before it (dry run), while it runs (budget), and after."""

from __future__ import annotations

import math

import pytest

from label_job import dish, make_job, stage_of
from rode_food.records import read_records
from rode_food.settings import SettingsError
from rode_food.unifood.label import Unfinished
from rode_food.unifood.label.price import Budget, image_tokens, usage_of
from rode_food.unifood.label.prompt import text_of
from rode_food.unifood.label.run import run
from rode_food.unifood.label.settings import LabelSettings
from vision_server import ANSWER_TOKENS, VisionServer

# every answer of the server costs 1, which is also the most if max_tokens is what it takes
ONE_EACH = dict(price_input=0.0, price_output=1e6 / ANSWER_TOKENS)


def test_gpt4o_image_tokens():
    """OpenAI's own examples: 1024 x 1024 is 765 tokens, 2048 x 4096 is 1105, anything at low detail 85."""
    large = LabelSettings(image_side=4096)
    assert image_tokens(1024, 1024, large) == 765
    assert image_tokens(2048, 4096, large) == 1105
    assert image_tokens(4096, 2048, large) == 1105
    assert image_tokens(2048, 4096, LabelSettings(image_detail="low")) == 85
    assert image_tokens(4000, 3000, LabelSettings(image_side=512)) == 255
    assert image_tokens(4000, 3000, LabelSettings(image_side=768)) == 85 + 4 * 170
    assert image_tokens(4000, 3000, LabelSettings(tokens_per_image=1200)) == 1200


def test_dry_run(tmp_path):
    """Prices what is missing, by values, and neither calls out nor writes anything."""
    records = [dish(tmp_path, i) for i in range(6)]
    again = type(records[0])(**{**vars(records[0]), "id": "again"})
    folder = make_job(tmp_path, records=[*records[:2]])
    with VisionServer() as server:
        run(stage_of(folder, base_url=server.url, **ONE_EACH))
        (folder / "label" / "records.jsonl").unlink()
        make_job(tmp_path, records=[*records, again])
        settings = dict(base_url=server.url, price_input=2.5, price_output=10.0, max_tokens=1000, budget=5.0)
        report = run(stage_of(folder, dry_run=True, **settings))
        assert len(server.calls) == 2
        batch = run(stage_of(folder, dry_run=True, mode="batch", **settings))
    lines = ["100 g food02", "50 g rice"]
    text = len(text_of(lines, None, stage_of(folder, **settings).settings.label).encode())
    picture = 255  # 64 x 53 pixels are one tile
    prompt, answer = 4 * (picture + math.ceil(text / 4)), 4 * (10 + 2 * 125)
    assert report == {
        "dry_run": True,
        "records": 7,
        "settled": 3,
        "to_ask": 4,
        "input_tokens": prompt,
        "output_tokens": answer,
        "cost": pytest.approx((prompt * 2.5 + answer * 10) / 1e6, abs=1e-6),
        "cost_at_most": pytest.approx(4 * 2 * ((picture + text + 16) * 2.5 + 1000 * 10) / 1e6, abs=1e-6),
        "answers": 2,
        "tokens": {"input": 2000, "output": 200, "answers_with_estimated_tokens": 0},
        "spent": 2.0,
        "lost_at_most": 0.0,
        "budget": 5.0,
        "budget_left": 3.0,
    }
    assert batch["cost"] == pytest.approx(report["cost"] / 2, abs=1e-6)
    assert not (folder / "label" / "records.jsonl").exists()
    empty = make_job(tmp_path / "empty", 2)
    assert run(stage_of(empty, dry_run=True))["to_ask"] == 2
    assert not (empty / "label" / "ledger.sqlite").exists()


def test_it_stops_before_the_budget_and_goes_on_with_a_larger_one(tmp_path):
    folder = make_job(tmp_path, 5)
    with VisionServer() as server:
        settings = dict(base_url=server.url, max_tokens=ANSWER_TOKENS, **ONE_EACH)
        with pytest.raises(Unfinished) as stop:
            run(stage_of(folder, budget=3.0, **settings))
        assert str(stop.value).startswith("the budget of 3 is reached: 2 contents are left, for about ")
        assert (stop.value.report["spent"], stop.value.report["budget_left"]) == (3.0, 0.0)
        assert stop.value.report["to_ask"] == 2
        assert len(server.requests) == 3
        assert not (folder / "label" / "records.jsonl").exists()
        report = run(stage_of(folder, budget=5.0, **settings))
        assert len(server.requests) == 5
    assert report["spent"] == 5.0
    assert [record.id for record in read_records(folder / "label" / "records.jsonl")] == [
        f"d0{i}" for i in range(5)
    ]


def test_what_is_under_way_is_set_aside_at_its_worst(tmp_path):
    """Answers may cost 2 and cost 1: with 3.5 there is room for one at a time, and for two in all."""
    folder = make_job(tmp_path, 5)
    with VisionServer(delay=0.02) as server:
        settings = dict(base_url=server.url, max_tokens=2 * ANSWER_TOKENS, **ONE_EACH)
        with pytest.raises(Unfinished, match="3 contents are left"):
            run(stage_of(folder, budget=3.5, **settings))
        assert (len(server.requests), server.most_at_once) == (2, 1)


def test_an_answer_that_got_lost_may_have_been_charged(tmp_path):
    """Its price counts, and another try needs money of its own."""
    folder = make_job(tmp_path, 1)
    with VisionServer(faults={"food00": ["drop"]}) as server:
        settings = dict(base_url=server.url, max_tokens=ANSWER_TOKENS, **ONE_EACH)
        with pytest.raises(Unfinished) as stop:
            run(stage_of(folder, budget=1.5, **settings))
        assert (stop.value.report["spent"], stop.value.report["lost_at_most"]) == (0.0, 1.0)
        with pytest.raises(Unfinished):
            run(stage_of(folder, budget=1.5, **settings))
        assert len(server.requests) == 1
        report = run(stage_of(folder, budget=2.0, **settings))
        assert len(server.requests) == 2
    assert (report["spent"], report["lost_at_most"], report["budget_left"]) == (1.0, 1.0, 0.0)
    # a refusal by HTTP is not charged
    folder = make_job(tmp_path / "other", 1)
    with VisionServer(faults={"food00": ["500", "429"]}) as server:
        report = run(stage_of(folder, budget=1.0, **settings | {"base_url": server.url}))
    assert (report["spent"], report["lost_at_most"]) == (1.0, 0.0)


def test_without_usage_tokens_are_estimated(tmp_path):
    folder = make_job(tmp_path, 2)
    with VisionServer(faults={"food00": "no usage"}) as server:
        report = run(stage_of(folder, base_url=server.url, price_input=0.0, price_output=1e6))
        raw = server.answer(server.requests[0])["choices"][0]["message"]["content"]
    assert report["tokens"]["answers_with_estimated_tokens"] == 1
    guess = report["tokens"]["output"] - ANSWER_TOKENS
    assert abs(guess - len(raw) / 4) <= 1
    assert report["spent"] == pytest.approx(ANSWER_TOKENS + guess)


@pytest.mark.parametrize(
    "usage", [None, {}, {"prompt_tokens": 0, "completion_tokens": 0}, {"prompt_tokens": "7"}]
)
def test_usage_that_says_nothing(usage):
    from rode_food.unifood.label.price import Estimate

    raw = {"usage": usage}
    assert usage_of(raw, "x" * 41, Estimate(50, 90, 30), LabelSettings()) == (50, 11, True)


def test_budget_arithmetic():
    budget = Budget(1.0, spent=0.4)
    assert budget.reserve(0.6)
    assert not budget.reserve(0.01)
    budget.settle(0.6, 0.1)
    assert budget.left == pytest.approx(0.5)
    assert budget.reserve(0.5)
    assert Budget(None).reserve(1e9)


def test_settings_that_cannot_be_meant(tmp_path):
    folder = make_job(tmp_path, 1)
    with pytest.raises(SettingsError, match=r"label.budget: needs label.price_input and label.price_output"):
        run(stage_of(folder, budget=1.0))
    with pytest.raises(SettingsError, match=r"label.concurrency: expected at least 1, got 0"):
        run(stage_of(folder, concurrency=0))
    with pytest.raises(SettingsError, match=r"label.energy_over: expected at least 0, got -0.1"):
        run(stage_of(folder, energy_over=-0.1))
    with pytest.raises(SettingsError, match=r"label.timeout: expected seconds above 0"):
        run(stage_of(folder, timeout=0.0))
