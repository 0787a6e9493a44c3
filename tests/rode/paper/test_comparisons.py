"""Differences, their errors, Holm's correction and power, against oracles: closed forms, loops in float64, statsmodels."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy import stats

from rode.paper.answers import Answer, answers_path, keep_answers, read_answers
from rode.paper.comparisons import Measured, compare, detectable, holm
from rode.paper.forest import differences_of, draw_forest, format_differences
from rode.paper.tables import Comparison, Item
from rode_food.metrics import score


def answers_of(values, groups=None, metric="category_accuracy"):
    """One answer for each value: value above, 1 below."""
    groups = groups or [f"g{i}" for i in range(len(values))]
    seen: dict[str, int] = {}
    out = []
    for group, value in zip(groups, values, strict=True):
        seen[group] = seen.get(group, 0) + 1
        out.append(Answer(f"{group}/{seen[group]}", "s", "category", "", {metric: (float(value), 1.0)}))
    return out


def made_up(rng, *, seeds=6, objects=40, photographs=3, shift=0.0, by_seed=0.0, by_object=0.0, noise=0.2):
    """Variants a and b; a - b has a mean of `shift`, and deviations by seed, by object and by answer."""
    groups = [f"g{i}" for i in range(objects) for _ in range(photographs)]
    per_object = rng.normal(0, by_object, objects).repeat(photographs)
    found = {"a": {}, "b": {}}
    for seed in range(seeds):
        common = rng.normal(0.5, 0.3, len(groups))
        change = shift + rng.normal(0, by_seed) + per_object + rng.normal(0, noise, len(groups))
        found["a"][seed] = answers_of(common + change, groups)
        found["b"][seed] = answers_of(common, groups)
    return found


ONE = {"a - b": Comparison(["a"], ["b"])}


def test_means_and_differences_by_hand():
    answers = {
        "a": {0: answers_of([1, 0, 1]), 1: answers_of([1, 1, 1])},
        "b": {0: answers_of([0, 0, 1]), 1: answers_of([1, 0, 0]), 7: answers_of([1, 1, 1])},
        "c": {0: answers_of([1, 1, 1]), 1: answers_of([0, 0, 0])},
    }
    a_b, mixed = compare({**ONE, "a, c - b": Comparison(["a", "c"], ["b"])}, ["category_accuracy"], answers)
    assert a_b.by_seed == pytest.approx((100 / 3, 200 / 3))
    assert (a_b.first, a_b.second, a_b.mean) == pytest.approx((250 / 3, 100 / 3, 50))
    assert a_b.effect == pytest.approx(50 / np.std([100 / 3, 200 / 3], ddof=1))
    assert mixed.by_seed == pytest.approx(((200 / 3 + 100) / 2 - 100 / 3, (100 + 0) / 2 - 100 / 3))
    assert (a_b.low + a_b.high) / 2 == pytest.approx(50)
    assert a_b.groups == 3


@pytest.mark.parametrize(
    ("by_seed", "by_object", "noise", "expected"),
    [
        # of a mean over 6 seeds and 40 objects of 3 photographs: deviations over square roots of how many there are
        (0.1, 0.0, 0.0, 0.1 / math.sqrt(6)),
        (0.0, 0.3, 0.0, 0.3 / math.sqrt(40)),
        (0.1, 0.3, 0.0, math.hypot(0.1 / math.sqrt(6), 0.3 / math.sqrt(40))),
    ],
)
def test_errors_against_closed_forms(by_seed, by_object, noise, expected):
    rng = np.random.default_rng(3)
    squares = []
    for _ in range(30):
        answers = made_up(rng, by_seed=by_seed, by_object=by_object, noise=noise)
        squares.append(compare(ONE, ["category_accuracy"], answers, rounds=1000)[0].error ** 2)
    assert math.sqrt(np.mean(squares)) == pytest.approx(100 * expected, rel=0.12)


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(5)
    inside = rejected = 0
    for _ in range(200):
        answers = made_up(rng, shift=0.1, by_seed=0.08, by_object=0.2, photographs=2)
        one = compare(ONE, ["category_accuracy"], answers, rounds=300)[0]
        inside += one.low <= 10 <= one.high
        rejected += one.p < 0.05
        assert (one.p < 0.05) == (not one.low <= 0 <= one.high)
    assert inside >= 186  # 95 % or more: the error errs to the large side
    assert 0.3 < rejected / 200 < 0.9


def test_the_bootstrap_is_the_one_described():
    """Against a loop that draws names and adds up, with a metric that is no mean over answers."""
    rng = np.random.default_rng(0)
    groups = ["x", "x", "y", "z", "z", "z"]
    answers = {
        v: {
            s: [
                Answer(
                    f"{g}/{i}",
                    "s",
                    "ingredients",
                    "",
                    {"ingredient_iou": tuple(sorted(rng.uniform(0, 4, 2)))},
                )
                for i, g in enumerate(groups)
            ]
            for s in range(3)
        }
        for v in ("a", "b")
    }
    measured = Measured("ingredient_iou", answers, [0, 1, 2])
    weights = np.array([[2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])  # of x, y, z
    values = measured.values(weights)
    for number, draw in enumerate((["x", "x", "z"], ["x", "y", "z"])):
        for v, variant in enumerate(("a", "b")):
            for s in range(3):
                taken = [a.sums["ingredient_iou"] for g in draw for a in answers[variant][s] if a.group == g]
                expected = 100 * sum(t[0] for t in taken) / sum(t[1] for t in taken)
                assert values[v, s, number] == pytest.approx(expected)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_and_power_against_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    power = pytest.importorskip("statsmodels.stats.power")
    rng = np.random.default_rng(1)
    for count in (1, 4, 16):
        p = rng.uniform(0, 0.2, count)
        assert holm(p.tolist()) == pytest.approx(multitest.multipletests(p, method="holm")[1])
    for seeds in (3, 6, 10):
        effect = power.TTestPower().solve_power(nobs=seeds, alpha=0.05, power=0.8)
        assert detectable(1 / math.sqrt(seeds), seeds - 1) == pytest.approx(effect, rel=1e-4)


def test_power_against_trials():
    rng = np.random.default_rng(2)
    shift = detectable(1 / math.sqrt(6), 5)
    trials = rng.normal(shift, 1, (20_000, 6))
    assert (stats.ttest_1samp(trials, 0, axis=1).pvalue < 0.05).mean() == pytest.approx(0.8, abs=0.01)
    assert detectable(0.0, 5) == 0
    assert detectable(1.0, 5, 0.01) > detectable(1.0, 5)


def test_what_cannot_be_compared_is_refused():
    good = answers_of([1, 0, 1])
    with pytest.raises(ValueError, match="two seeds or more that all of a, b have, got 1"):
        compare(ONE, ["category_accuracy"], {"a": {0: good, 1: good}, "b": {1: good, 2: good}})
    other = answers_of([1, 0, 1], ["g0", "g1", "g5"])
    with pytest.raises(ValueError, match="the same questions from all runs, got others from b seed 1"):
        compare(ONE, ["category_accuracy"], {"a": {0: good, 1: good}, "b": {0: good, 1: other}})
    with pytest.raises(ValueError, match="got others from a seed 0"):
        compare(ONE, ["rouge_l"], {"a": {0: good, 1: good}, "b": {0: good, 1: good}})


def test_a_comparison_in_metrics_of_its_own():
    """A variant that learned one task has no answers of the others, and is compared in that task alone."""

    def recipes(values):
        return [
            Answer(f"{i}", "s", "recipe", "", {"rouge_l": (value, 1.0)}) for i, value in enumerate(values)
        ]

    both = {0: [*answers_of([1, 0]), *recipes([1, 0])], 1: [*answers_of([1, 1]), *recipes([1, 1])]}
    answers = {"a": both, "b": both, "alone": {0: recipes([0, 0]), 1: recipes([0, 1])}}
    alone = Comparison(["a"], ["alone"], ["rouge_l"])
    found = compare({**ONE, "a - alone": alone}, ["category_accuracy", "rouge_l"], answers, rounds=50)
    assert [(one.comparison, one.metric) for one in found] == [
        ("a - b", "category_accuracy"),
        ("a - b", "rouge_l"),
        ("a - alone", "rouge_l"),
    ]
    assert found[2].by_seed == pytest.approx((50, 50))
    assert found[2].detectable_holm == pytest.approx(detectable(found[2].error, 1, 0.05 / 3))
    with pytest.raises(
        ValueError, match="category_accuracy: expected answers to the same questions from all runs"
    ):
        compare({**ONE, "a - alone": Comparison(["a"], ["alone"])}, ["category_accuracy"], answers, rounds=50)


def test_sacrebleu_and_differences_that_do_not_vary():
    counts = (10.0, 12.0, 8.0, 5.0, 3.0, 2.0, 10.0, 9.0, 8.0, 7.0)
    answers = [Answer(f"{i}", "s", "recipe", "", {"sacrebleu": counts}) for i in range(4)]
    both = {"a": {0: answers, 1: answers}, "b": {0: answers, 1: answers}}
    (one,) = compare(ONE, ["sacrebleu"], both, rounds=20)
    assert one.first == one.second > 10
    assert (one.error, one.p, one.p_holm, one.effect, one.detectable) == (0, 1, 1, None, 0)


def test_answers_are_kept_and_read(tmp_path):
    rows = [
        {
            "id": "o1/side_1",
            "task": "ingredients",
            "answer": "rice, egg",
            "truth": "rice",
            "reference": ["rice"],
        },
        {"id": "o1/side_2", "task": "category", "answer": "Soup", "truth": "soup", "reference": "soup"},
    ]
    rows = [{"source": "s", "question": "?", "image": "", **row} for row in rows]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = answers_path(tmp_path / "seed-3.json")
    assert file.name == "seed-3.answers.jsonl.gz"
    keep_answers(tmp_path / "predictions.jsonl", file)
    before = file.read_bytes()
    keep_answers(tmp_path / "predictions.jsonl", file)
    assert file.read_bytes() == before
    first, second = read_answers(file)
    assert first == Answer(
        "o1/side_1",
        "s",
        "ingredients",
        "rice, egg",
        {"ingredient_iou": (1, 2), "ingredient_iou_mean": (0.5, 1)},
    )
    assert (first.group, second.sums) == ("o1", {"category_accuracy": (1, 1)})
    assert score(rows)["all"]["ingredient_iou"] == 50
    for damage in (b"x", before[:20]):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match="not the answers of a run"):
            read_answers(file)


def test_the_table_and_the_plot():
    answers = made_up(np.random.default_rng(0), shift=0.4)
    item = Item(
        "Title",
        "d",
        ["a", "b"],
        ["category_accuracy"],
        [],
        "comparisons",
        {"a - b": Comparison(["a"], ["b"])},
    )
    found = differences_of(item, answers)
    text = format_differences("Title", found, ["a note"])
    assert "Title; 6 seeds" in text
    assert "category (more is better), 40 groups" in text
    assert f" {found[0].mean:+.2f} | " in text
    assert text.endswith("- a note")
    pytest.importorskip("matplotlib")
    (axes,) = draw_forest(found).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a - b"]
    assert axes.lines[0].get_xdata().tolist() == [found[0].low, found[0].high]
    assert axes.lines[2].get_xdata().tolist() == list(found[0].by_seed)
