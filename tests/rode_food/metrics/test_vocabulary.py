"""Ingredient IoU with a vocabulary, by hand; without one nothing changes."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode.evaluation.evaluate import format_scores
from rode_food.metrics import IngredientIoU, ingredient_iou, score
from rode_food.vocabulary import Vocabulary

VOCABULARY = Vocabulary(
    {
        "egg": {"egg": 5, "eggs": 5},
        "oil": {"oil": 9, "olive_oil": 4},
        "salt": {"salt": 9, "sea_salt": 2},
        "rice": {"rice": 3},
    }
)


def row(source: str, answer: str, *truth: str) -> dict:
    return {
        "id": "x",
        "source": source,
        "task": "ingredients",
        "answer": answer,
        "truth": ", ".join(truth),
        "reference": list(truth),
    }


def test_by_hand() -> None:
    predicted = [
        ["Olive oil", "oil", "Eggs", "yuzu"],  # {oil, egg, yuzu}; yuzu is wrong: the truth has none
        ["sea salt", "saffron"],  # {salt}: saffron is no name of the vocabulary, but right
        ["saffron", "rock salt"],  # {rock_salt}: no name of the vocabulary, and wrong
        None,
    ]
    true = [
        ["egg", "oil", "olive oil"],  # {egg, oil}
        ["salt", "Saffron", "rice"],  # {salt, rice}
        ["rice", "saffron", "yuzu"],  # {rice}
        ["eggs"],
    ]
    # common 2, 1, 0, 0; union 3, 2, 2, 1
    result = ingredient_iou(predicted, true, VOCABULARY)
    assert result.overall == pytest.approx(100 * 3 / 8)
    assert result.mean == pytest.approx(100 * (2 / 3 + 1 / 2) / 4)
    # canonical names 2 + 2 + 1 + 1 of 2 + 3 + 3 + 1
    assert result.coverage == pytest.approx(100 * 6 / 9)
    assert result.left_out == 0
    # the same without one: common {oil, olive oil}, {saffron}, {saffron}, {}; union 5 (eggs, egg, yuzu), 4, 4, 1
    plain = ingredient_iou(predicted, true)
    assert plain.overall == pytest.approx(100 * 4 / 14)
    assert (plain.coverage, plain.left_out) == (None, 0)


def test_images_of_which_nothing_is_known_count_nowhere() -> None:
    result = ingredient_iou([["egg"], ["egg"], []], [["yuzu"], ["egg"], []], VOCABULARY)
    # the first is left out; the third has no name on either side, and agrees
    assert result == IngredientIoU(100.0, 100.0, 50.0, 1)
    assert ingredient_iou([["egg"]], [["yuzu"]], VOCABULARY) == IngredientIoU(None, None, 0.0, 1)
    assert ingredient_iou([[]], [[]], VOCABULARY) == IngredientIoU(100.0, 100.0, None, 0)
    # predicted, where nothing is true
    assert ingredient_iou([["egg"]], [[]], VOCABULARY) == IngredientIoU(0.0, 0.0, None, 0)


names = st.lists(
    st.sampled_from(["egg", "eggs", "oil", "olive oil", "Salt", "yuzu", "saffron", "12"]), max_size=5
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=6))
def test_one_that_knows_every_name_as_itself_changes_nothing(pairs: list) -> None:
    predicted, true = map(list, zip(*pairs, strict=True))
    every = {n: {n: 1} for n in ("egg", "eggs", "oil", "olive_oil", "salt", "yuzu", "saffron")}
    plain, merged = ingredient_iou(predicted, true), ingredient_iou(predicted, true, Vocabulary(every))
    assert (merged.overall, merged.mean, merged.left_out) == (plain.overall, plain.mean, 0)
    # and with any, the truth itself is a perfect answer
    perfect = ingredient_iou(true, true, VOCABULARY)
    assert perfect.overall in (None, 100)
    assert perfect.mean in (None, 100)


def test_scores_say_whether_one_was_used() -> None:
    rows = [row("a", "eggs, olive oil", "egg", "oil", "yuzu"), row("b", "egg", "yuzu")]
    plain, merged = score(rows), score(rows, VOCABULARY)
    assert plain["all"] == {"n_ingredients": 2, "ingredient_iou": 0.0, "ingredient_iou_mean": 0.0}
    assert merged["all"] == {
        "n_ingredients": 2,
        "ingredient_iou": 100.0,
        "ingredient_iou_mean": 100.0,
        "ingredient_vocabulary": VOCABULARY.name,
        "ingredient_coverage": 50.0,
        "n_ingredients_left_out": 1,
    }
    assert merged["b"]["ingredient_iou"] is None
    assert format_scores(merged).splitlines()[-1] == f"ingredient_vocabulary: {VOCABULARY.name}"
