from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.metrics import (
    category_accuracy,
    ingredient_iou,
    mean_baseline,
    normalise_name,
    pmae,
    read_predictions,
    rouge_l,
    sacrebleu,
    score,
)
from rode_food.metrics.nutrition import LARGEST

FIELDS = ("mass", "energy", "fat", "protein", "carb")


def five(mass: float, energy: float, fat: float, protein: float, carb: float) -> dict[str, float]:
    return dict(zip(FIELDS, (mass, energy, fat, protein, carb), strict=True))


# --- ingredients


@pytest.mark.parametrize(
    ("name", "normalised"),
    [
        ("White  Rice", "white rice"),
        ("2% milk, (cold)", "milk cold"),
        ("red-pepper flakes", "red pepper flakes"),
        ("Baker's yeast", "bakers yeast"),
        ("CRÈME fraîche!", "creme fraiche"),
        ("jalapen\u0303o", "jalapeno"),
        ("brown_sugar", "brown sugar"),
        ("100", ""),
    ],
)
def test_normalised_names(name: str, normalised: str) -> None:
    assert normalise_name(name) == normalised
    assert normalise_name(normalised) == normalised


def test_iou_by_hand() -> None:
    predicted = [["Rice", "egg", "egg."], None, ["salt", "pepper", "oil", "12"], []]
    true = [["rice", "eggs"], ["beef"], ["oil", "salt"], []]
    result = ingredient_iou(predicted, true)
    # intersections 1, 0, 2, 0; unions 3, 1, 3, 0
    assert result.overall == pytest.approx(100 * 3 / 7)
    assert result.mean == pytest.approx(100 * (1 / 3 + 0 + 2 / 3 + 1) / 4)


sets = st.lists(st.sets(st.sampled_from("abcdefgh")), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(sets, st.randoms(use_true_random=False))
def test_global_iou_is_tp_over_tp_fp_fn(true: list[set[str]], rng: random.Random) -> None:
    predicted = [{name for name in "abcdefgh" if rng.random() < 0.4} for _ in true]
    tp = fp = fn = 0
    for answer, truth in zip(predicted, true, strict=True):
        for name in "abcdefgh":
            tp += name in answer and name in truth
            fp += name in answer and name not in truth
            fn += name not in answer and name in truth
    expected = 100 * tp / (tp + fp + fn) if tp + fp + fn else 100
    assert ingredient_iou(predicted, true).overall == pytest.approx(expected)


# --- recipes


def bleu_by_the_paper(predicted: list[list[str]], true: list[list[str]]) -> float:
    """Papineni et al. 2002, one reference, no smoothing: for texts that share a 4-gram."""
    logs = 0.0
    for n in range(1, 5):
        hits = total = 0
        for answer, truth in zip(predicted, true, strict=True):
            left = Counter(tuple(answer[i : i + n]) for i in range(len(answer) - n + 1))
            right = Counter(tuple(truth[i : i + n]) for i in range(len(truth) - n + 1))
            hits += sum((left & right).values())
            total += sum(left.values())
        logs += math.log(hits / total) / 4
    c, r = sum(map(len, predicted)), sum(map(len, true))
    return 100 * math.exp(logs) * (1 if c > r else math.exp(1 - r / c))


ANSWERS = ["boil the rice in salted water .\nserve it hot", "fry the egg and put it on top of the rice"]
TRUTHS = ["boil the rice in a lot of salted water .\nserve hot", "fry the egg and put it on top"]


def test_bleu_equals_the_formula() -> None:
    value, signature = sacrebleu(ANSWERS, TRUTHS)
    assert value == pytest.approx(
        bleu_by_the_paper([a.split() for a in ANSWERS], [t.split() for t in TRUTHS])
    )
    assert 40 < value < 80
    assert signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert sacrebleu(TRUTHS, TRUTHS)[0] == pytest.approx(100)
    assert sacrebleu(["", ""], TRUTHS)[0] == 0


def lcs(a: list[str], b: list[str]) -> int:
    if not a or not b:
        return 0
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def test_rouge_l_equals_the_formula() -> None:
    expected = []
    for answer, truth in zip(ANSWERS, TRUTHS, strict=True):
        left, right = ([word for word in text.split() if word != "."] for text in (answer, truth))
        common = lcs(left, right)
        precision, recall = common / len(left), common / len(right)
        expected.append(2 * precision * recall / (precision + recall))
    assert rouge_l(ANSWERS, TRUTHS) == pytest.approx(100 * sum(expected) / 2)
    # by hand: "boil rice" in "boil the rices": LCS 1 of 2 and 3 (no stemmer), F = 2 * 1/2 * 1/3 / (5/6)
    assert rouge_l(["Boil rice!"], ["boil the rices"]) == pytest.approx(40)
    assert rouge_l([""], ["boil"]) == 0


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_package(name: str, *args: object) -> object:
        raise ImportError(name)

    monkeypatch.setattr("rode_food.metrics.tokens.importlib.import_module", no_package)
    with pytest.raises(
        ImportError, match=r"SacreBLEU needs the package sacrebleu: pip install 'rode\[metrics\]'"
    ):
        sacrebleu(["a"], ["a"])
    with pytest.raises(
        ImportError, match=r"ROUGE-L needs the package rouge_score: pip install 'rode\[metrics\]'"
    ):
        rouge_l(["a"], ["a"])


# --- nutrition


def test_pmae_by_hand() -> None:
    true = [five(100, 200, 10, 5, 20), five(300, 600, 30, 15, 0), five(200, 400, 20, 40, 40)]
    predicted = [five(110, 180, 10, 5, 25), None, five(200, 400, 20, 30, 40) | {"fat": None}]
    result = pmae(predicted, true)
    # the second answer counts as zeros, and so does the third's fat
    assert result.fields == pytest.approx(
        {
            "mass": 100 * (10 + 300 + 0) / 600,
            "energy": 100 * (20 + 600 + 0) / 1200,
            "fat": 100 * (0 + 30 + 20) / 60,
            "protein": 100 * (0 + 15 + 10) / 60,
            "carb": 100 * (5 + 0 + 0) / 60,
        }
    )
    assert result.mean == pytest.approx(sum(result.fields.values()) / 5)
    assert result.parse_rate == pytest.approx(100 / 3)
    # over the first answer alone
    assert result.parsed_fields == pytest.approx(five(10, 10, 0, 0, 25))
    assert result.parsed_mean == pytest.approx(9)


def test_silence_costs_the_whole_truth() -> None:
    true = [five(100, 200, 10, 5, 20), five(300, 600, 30, 15, 10)]
    result = pmae([None, {}], true)
    assert result.fields == five(100, 100, 100, 100, 100)
    assert (result.mean, result.parse_rate, result.parsed_mean) == (100, 0, None)


def test_pmae_is_undefined_where_every_truth_is_zero() -> None:
    result = pmae([five(1, 1, 1, 1, 1)], [five(1, 2, 0, 1, 4)])
    assert result.fields == {"mass": 0, "energy": 50, "fat": None, "protein": 0, "carb": 75}
    assert result.mean is None


def test_an_unknown_truth_counts_for_no_field() -> None:
    true = [five(100, 200, 10, 5, 20), {"mass": 300, "energy": None}]
    result = pmae([five(110, 200, 10, 5, 20), five(300, 1e4, 1e4, 1e4, 1e4)], true)
    assert result.fields == {"mass": 2.5, "energy": 0, "fat": 0, "protein": 0, "carb": 0}
    assert pmae([five(1, 1, 1, 1, 1)], [{}]).fields == dict.fromkeys(FIELDS)
    baseline = mean_baseline(true, [five(200, 200, 10, 5, 40)])
    assert baseline.fields == {"mass": 0, "energy": 0, "fat": 0, "protein": 0, "carb": 50}


@pytest.mark.parametrize("number", [1e41, math.inf, math.nan, -5.0, LARGEST + 1])
def test_a_number_that_no_plate_has_counts_as_not_given(number: float) -> None:
    """One answer of 1e41 made every mean infinite."""
    true = [five(100, 200, 10, 5, 20), five(300, 600, 30, 15, 10)]
    result = pmae([five(number, 200, 10, 5, 20), five(300, 600, 30, 15, 10)], true)
    assert result.fields == {"mass": 25, "energy": 0, "fat": 0, "protein": 0, "carb": 0}
    assert result.parse_rate == 50
    assert pmae([five(LARGEST, 0, 0, 0, 0)], [five(LARGEST, 1, 1, 1, 1)]).fields["mass"] == 0


@pytest.mark.parametrize("truth", [-1.0, math.inf, math.nan])
def test_a_truth_that_is_none_is_refused(truth: float) -> None:
    with pytest.raises(ValueError, match="dish 2: fat: expected a number of at least 0, or null"):
        pmae([None, None], [five(1, 1, 1, 1, 1), five(1, 1, truth, 1, 1)])


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("ingredients", {"reference": None}, "reference: expected a list of names, got None"),
        ("ingredients", {"reference": ["egg", 3]}, "reference: expected a list of names"),
        ("nutrition", {"reference": None}, "reference: expected a mapping of numbers"),
        ("nutrition", {"reference": {"mass": "12"}}, "reference: mass: expected a number of at least 0, or null, got '12'"),
        ("nutrition", {"reference": {"carb": -3}}, "reference: carb: expected a number of at least 0, or null, got -3"),
        ("category", {"reference": None}, "reference: expected text, got None"),
        ("recipe", {"truth": None}, "truth: expected text, got None"),
    ],
)  # fmt: skip
def test_score_names_a_truth_that_it_cannot_compare_with(task: str, change: dict, message: str) -> None:
    row = {"id": "1", "source": "s", "task": task, "answer": "x", "truth": "x", "reference": "x"}
    with pytest.raises(ValueError, match=f"prediction 1: {re.escape(message)}"):
        score([row | change])


def test_the_mean_baseline() -> None:
    train = [five(100, 100, 0, 10, 20), five(300, 500, 20, 10, 40)]
    test = [five(150, 300, 10, 20, 30), five(250, 300, 30, 10, 10)]
    # always 200, 300, 10, 10, 30
    assert mean_baseline(train, test).fields == pytest.approx(
        {"mass": 25, "energy": 0, "fat": 50, "protein": 100 * 10 / 30, "carb": 50}
    )
    with pytest.raises(ValueError, match="train: expected at least one dish"):
        mean_baseline([], test)


values = st.floats(0.1, 1000)
dishes = st.lists(st.tuples(*[values] * 10), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(dishes)
def test_pmae_equals_the_ratio_of_means(rows: list[tuple]) -> None:
    predicted, true = [five(*row[:5]) for row in rows], [five(*row[5:]) for row in rows]
    result = pmae(predicted, true)
    for k, name in enumerate(FIELDS):
        mae = sum(abs(row[k] - row[5 + k]) for row in rows) / len(rows)
        assert result.fields[name] == pytest.approx(100 * mae / (sum(row[5 + k] for row in rows) / len(rows)))
    assert result.parsed_fields == result.fields


# --- all together


def row(task: str, source: str, answer: str, truth: str, reference: object) -> dict:
    return {
        "id": "x",
        "source": source,
        "task": task,
        "answer": answer,
        "truth": truth,
        "reference": reference,
    }


ROWS = [
    row("ingredients", "a", "Rice, egg", "rice, eggs", ["rice", "eggs"]),
    row("ingredients", "b", "beef", "beef", ["beef"]),
    row("nutrition", "a", "mass 110 g, energy 180 kcal, fat 10 g, protein 5 g, carbohydrate 25 g", "",
        five(100, 200, 10, 5, 20)),
    row("nutrition", "b", "I do not know.", "", five(300, 600, 30, 15, 10)),
    row("recipe", "a", ANSWERS[0], TRUTHS[0], TRUTHS[0].split("\n")),
    row("recipe", "a", ANSWERS[1], TRUTHS[1], TRUTHS[1].split("\n")),
    row("category", "b", "This is a Soup.", "soup", "soup"),
    row("category", "b", "", "soup", "soup"),
    row("category", "a", "stew", "soup", "soup"),
]  # fmt: skip


def test_scores_are_kept_apart_by_source() -> None:
    scores = score(ROWS)
    assert list(scores) == ["all", "a", "b"]
    bleu, signature = sacrebleu(ANSWERS, TRUTHS)
    assert scores["a"] == {
        "n_ingredients": 1,
        "ingredient_iou": pytest.approx(100 / 3),
        "ingredient_iou_mean": pytest.approx(100 / 3),
        "n_recipe": 2,
        "sacrebleu": pytest.approx(bleu),
        "sacrebleu_signature": signature,
        "rouge_l": pytest.approx(rouge_l(ANSWERS, TRUTHS)),
        "rouge_l_tokenizer": "rouge_score",
        "n_nutrition": 1,
        "pmae_mass": pytest.approx(10),
        "pmae_energy": pytest.approx(10),
        "pmae_fat": 0,
        "pmae_protein": 0,
        "pmae_carb": pytest.approx(25),
        "pmae": pytest.approx(9),
        "parse_rate": 100,
        "pmae_parsed": pytest.approx(9),
        "n_category": 1,
        "category_accuracy": 0,
    }
    b = scores["b"]
    assert (b["pmae"], b["parse_rate"], b["pmae_parsed"], b["category_accuracy"]) == (100, 0, None, 50)
    assert "sacrebleu" not in b
    everything = scores["all"]
    assert everything["ingredient_iou"] == pytest.approx(50)  # TP 2, union 4
    assert everything["ingredient_iou_mean"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert everything["pmae_mass"] == pytest.approx(100 * (10 + 300) / 400)
    assert everything["category_accuracy"] == pytest.approx(100 / 3)
    json.dumps(scores, allow_nan=False)


def test_every_metric_is_documented() -> None:
    text = (Path(__file__).parents[3] / "docs" / "records.md").read_text(encoding="utf-8")
    for name in score(ROWS)["all"]:
        between = name in ("pmae_energy", "pmae_fat", "pmae_protein")  # `pmae_mass` ... `pmae_carb`
        assert between or name.startswith("n_") or f"`{name}`" in text, name


def test_scores_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    assert score(read_predictions(path)) == score(ROWS)
    path.write_text(json.dumps(ROWS[0]) + "\n{\n")
    with pytest.raises(ValueError, match=r"predictions\.jsonl:2: not JSON"):
        score(read_predictions(path))
    path.write_text("3\n")
    with pytest.raises(ValueError, match=r"predictions\.jsonl:1: expected an object, got 3"):
        score(read_predictions(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"task": "cook"},
            "prediction 2: task: expected one of ingredients, recipe, nutrition, category, question, got 'cook'",
        ),
        ({"source": "all"}, 'prediction 2: source: "all" stands for the sum of all'),
        ({"answer": None}, "prediction 2: answer: expected text, got None"),
    ],
)
def test_bad_rows(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score([ROWS[0], ROWS[0] | change])
    with pytest.raises(ValueError, match="prediction 1: missing answer, reference"):
        score([{k: v for k, v in ROWS[0].items() if k not in ("answer", "reference")}])


def test_unequal_or_empty_lists_are_refused() -> None:
    for metric in (ingredient_iou, pmae, sacrebleu, rouge_l):
        with pytest.raises(ValueError, match="expected equal lengths > 0, got 0 and 0"):
            metric([], [])  # type: ignore[operator]
        with pytest.raises(ValueError, match="expected equal lengths > 0, got 1 and 2"):
            metric(["a"], ["a", "b"])  # type: ignore[operator]
    with pytest.raises(ValueError, match="at least one category"):
        category_accuracy([], [])


def test_free_answers() -> None:
    pairs = [("Yes.", "yes."), (" a  soup\n", "A soup"), ("3", "2"), ("a red soup", "a soup")]
    rows = [
        {"id": "a", "source": "s", "task": "question", "answer": answer, "truth": truth, "reference": truth}
        for answer, truth in pairs
    ]
    found = score(rows)["s"]
    assert found["n_question"] == 4
    assert found["question_exact"] == 50.0
    # 1, 1, 0, and F of 2 of 3 words that are 2 of 2
    assert found["question_rouge_l"] == pytest.approx(100 * (1 + 1 + 0 + 0.8) / 4)
