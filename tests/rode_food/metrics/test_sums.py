"""Sums over answers give the metrics that scoring gives."""

from __future__ import annotations

import random

import pytest

from rode_food.metrics import score
from rode_food.metrics.sums import PMAE, metric_of, sums_of
from rode_food.nutrition_text import format_nutrition
from rode_food.records import NUTRITION_FIELDS

STEPS = "Boil the water.\nAdd the rice and stir it well.\nServe it hot with salt and butter on top."


def rows(seed: int) -> list[dict]:
    rng = random.Random(seed)
    names = ["rice", "bean", "leek", "Soy Sauce", "egg"]
    out = []

    def add(task: str, answer: str, truth: str, reference: object) -> None:
        row = {"id": f"{len(out)}", "source": "s", "task": task, "answer": answer, "truth": truth}
        out.append({**row, "reference": reference})

    for _ in range(12):
        true, said = rng.sample(names, 2), rng.sample(names, rng.randrange(4))
        add("ingredients", ", ".join(said), ", ".join(true), true)
        values = {name: rng.uniform(0, 300) for name in NUTRITION_FIELDS}
        guess = format_nutrition({name: rng.uniform(0, 300) for name in NUTRITION_FIELDS})
        add("nutrition", rng.choice([guess, "mass 12 g", "no idea"]), format_nutrition(values), values)
        add("category", rng.choice(["Soup", "stew"]), "soup", "soup")
        words = STEPS.split(" ")
        add("recipe", " ".join(rng.sample(words, 15)), STEPS, STEPS.split("\n"))
        add("recipe", STEPS.replace("rice", rng.choice(names)), STEPS, STEPS.split("\n"))
        add("question", rng.choice(["Yes", "No idea"]), "yes", "yes")
    return out


def added(some: list[dict]) -> dict[str, list[float]]:
    sums: dict[str, list[float]] = {}
    for row in some:
        for name, values in sums_of(row).items():
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * len(values)), values, strict=True)]
    return sums


@pytest.mark.parametrize("seed", range(4))
def test_every_metric_of_score(seed: int) -> None:
    some = rows(seed)
    sums, scored = added(some), score(some)["all"]
    names = [
        *PMAE,
        "pmae",
        "parse_rate",
        "ingredient_iou",
        "ingredient_iou_mean",
        "category_accuracy",
        "sacrebleu",
    ]
    for name in [*names, "rouge_l", "question_exact", "question_rouge_l"]:
        assert metric_of(name, sums) == pytest.approx(scored[name], rel=1e-9), name


def test_a_record_drawn_twice_counts_twice() -> None:
    some = rows(0)
    again = some + [row for row in some if int(row["id"]) % 3 == 0]
    for name in ("ingredient_iou", "pmae", "sacrebleu", "rouge_l", "category_accuracy"):
        assert metric_of(name, added(again)) == pytest.approx(score(again)["all"][name], rel=1e-9)


def test_what_is_undefined_is_none() -> None:
    nothing = {"mass": 0.0, "energy": 1.0, "fat": 1.0, "protein": 1.0, "carb": 1.0}
    row = {"id": "a", "source": "s", "task": "nutrition", "answer": "", "truth": "", "reference": nothing}
    assert metric_of("pmae_mass", added([row])) is None
    assert metric_of("pmae", added([row])) is None
    assert metric_of("pmae_fat", added([row])) == 100
    empty = {"id": "a", "source": "s", "task": "ingredients", "answer": "", "truth": "", "reference": []}
    assert metric_of("ingredient_iou", added([empty])) is None
    with pytest.raises(KeyError):
        metric_of("rouge_l", {})
