from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from rode_food.records import (
    NUTRITION_FIELDS,
    FoodRecord,
    Ingredient,
    Nutrition,
    Quantity,
    read_records,
    write_records,
)
from rode_food.unifood import aggregate
from rode_food.unifood.aggregate import total
from rode_food.unifood.stage import Stage

from .conftest import small_settings


def ingredient(name: str, *numbers: float | None, **micro: Quantity) -> Ingredient:
    return Ingredient(name, nutrition=Nutrition(*numbers, micronutrients=micro))


def test_the_sum_by_hand() -> None:
    dish = total(
        (
            ingredient(
                "rice", 158.0, 205.0, 0.4, 4.3, 44.5, sodium=Quantity(2.0, "mg"), iron=Quantity(1.9, "mg")
            ),
            ingredient(
                "egg", 50.0, 72.0, 4.8, 6.3, 0.4, sodium=Quantity(0.071, "g"), b12=Quantity(0.5, "ug")
            ),
            ingredient("salt", 0.1, 0.0, 0.0, 0.0, 0.0, sodium=Quantity(38.8, "mg")),
        )
    )
    assert [getattr(dish, name) for name in NUTRITION_FIELDS] == [208.1, 277.0, 5.2, 10.6, 44.9]
    # iron and B12 are unknown for the rest of the dish
    assert dish.micronutrients.keys() == {"sodium"}
    assert dish.micronutrients["sodium"].unit == "mg"
    assert math.isclose(dish.micronutrients["sodium"].value, 2 + 71 + 38.8, rel_tol=1e-15)


def test_what_one_ingredient_lacks_is_unknown_in_the_dish() -> None:
    dish = total((ingredient("a", 10.0, 1.0, 1.0, 1.0, 1.0), Ingredient("b", mass=5.0)))
    assert dish == Nutrition(mass=15.0)
    assert total((Ingredient("a"),)) == Nutrition()
    assert total(()) == Nutrition(), "nothing is not zero"


def test_a_micronutrient_needs_its_share_of_the_mass() -> None:
    parts = (
        ingredient("a", 90.0, 1.0, 1.0, 1.0, 1.0, iron=Quantity(1.0, "mg")),
        ingredient("b", 10.0, 1.0, 1.0, 1.0, 1.0),
    )
    assert total(parts, 0.9).micronutrients == {"iron": Quantity(1.0, "mg")}
    assert total(parts, 0.91).micronutrients == {}
    other_unit = (*parts, ingredient("c", 0.0, 1.0, 1.0, 1.0, 1.0, iron=Quantity(4.0, "IU")))
    assert total(other_unit, 0.9).micronutrients == {}


numbers = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(st.tuples(*[numbers] * 5), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_order_does_not_matter_to_the_last_bit(rows: list[tuple[float, ...]], random: object) -> None:
    parts = [ingredient("x", *row) for row in rows]
    one = total(tuple(parts))
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert total(tuple(parts)) == one
    for i, name in enumerate(NUTRITION_FIELDS):
        assert getattr(one, name) == math.fsum(row[i] for row in rows)


def test_the_stage(tmp_path: Path, stage: Callable[..., Stage]) -> None:
    good = (ingredient("a", 100.0, 50.0, 1.0, 2.0, 8.0), ingredient("b", 20.0, 10.0, 0.0, 0.0, 2.5))
    rows = {
        "good": good,
        "light": (ingredient("a", 1.0, 1.0, 0.0, 0.0, 0.0),),
        "heavy": (ingredient("a", 3e4, 1.0, 0.0, 0.0, 0.0),),
        "lacks": (*good, Ingredient("c", mass=3.0)),
    }
    write_records(
        tmp_path / "in.jsonl",
        [FoodRecord(name, "/a.jpg", "s", ingredients=parts) for name, parts in rows.items()],
    )
    one = stage("aggregate", small_settings(), tmp_path / "in.jsonl")
    report = aggregate.run(one)
    assert report == {
        "records": 1,
        "set_aside": {"a mass that no dish has": 2, "an ingredient without a number": 1},
    }
    (record,) = read_records(one.output)
    assert (record.id, record.ingredients) == ("good", good)
    assert record.nutrition == Nutrition(120.0, 60.0, 1.0, 2.0, 10.5)
    aside = [json.loads(line) for line in (one.folder / "set_aside.jsonl").read_text().splitlines()]
    assert aside == [
        {"id": "light", "reason": "a mass that no dish has", "detail": "1 g"},
        {"id": "heavy", "reason": "a mass that no dish has", "detail": "30000 g"},
        {"id": "lacks", "reason": "an ingredient without a number", "detail": "energy, fat, protein, carb"},
    ]
