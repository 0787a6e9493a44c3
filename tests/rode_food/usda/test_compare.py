from __future__ import annotations

import json

import pytest

from rode_food.records import FoodRecord, Ingredient, Nutrition
from rode_food.usda import Estimator, Food, FoodTable, load_foods
from rode_food.usda.audit import Audit
from rode_food.usda.audit_report import audit_html, audit_text
from rode_food.usda.compare import Limits, compare, disagreements
from rode_food.usda.names import CommonFood
from tiny_usda import tiny_common, tiny_table

LIMITS = Limits(tolerance=0.3, energy_floor=10, macro_floor=1, coverage=0.8, mass_tolerance=0.5)


def labelled(name, mass, energy, fat, protein, carb, **more):
    return Ingredient(name, mass=mass, nutrition=Nutrition(mass, energy, fat, protein, carb), **more)


def dish(*ingredients, **nutrition):
    sums = {
        name: sum(getattr(i.nutrition, name) or 0 for i in ingredients if i.nutrition)
        for name in ("mass", "energy", "fat", "protein", "carb")
    }
    return FoodRecord("d", "d.jpg", "s", ingredients=ingredients, nutrition=Nutrition(**(sums | nutrition)))


FLOUR = labelled("flour", 100, 350, 1, 10, 75, text="100 g flour")  # as the table has it
OIL = labelled(
    "oil", 50, 400, 45, 0, 0, text="4 tablespoons oil"
)  # the table: 442 kcal, 50 g; the line: 54 g
DUST = labelled("stardust", 10, 100, 0, 0, 25, text="10 g stardust")


def test_a_dish_by_hand(tiny):
    found = compare(dish(FLOUR, OIL, DUST), tiny)
    assert found.label == {"energy": 850, "fat": 46, "protein": 10, "carb": 100}
    assert found.usda == {"energy": 350 + 442 + 100, "fat": 51, "protein": 10, "carb": 100}
    assert found.mass_coverage == pytest.approx(150 / 160)
    assert found.energy_coverage == pytest.approx(1 - 100 / 850)
    assert (found.label_mass, found.line_mass) == (160, 164)
    assert found.weighed == 1
    assert disagreements(found, LIMITS) == []


@pytest.mark.parametrize(
    ("ingredient", "outside"),
    [
        (labelled("flour", 100, 350 * 4.184, 1, 10, 75, text="100 g flour"), ["energy"]),  # kilojoules
        (labelled("flour", 100, 360, 2.5, 10, 75, text="100 g flour"), ["fat"]),
        (labelled("flour", 100, 350, 1.9, 10, 75, text="100 g flour"), []),  # 90 %, yet less than a gram
        (labelled("flour", 300, 1050, 3, 30, 225, text="100 g flour"), ["mass"]),  # right by the gram
        (labelled("flour", 300, 1050, 3, 30, 225, text="flour"), []),  # a line that tells no grams
    ],
)
def test_disagreements(tiny, ingredient, outside):
    assert disagreements(compare(dish(ingredient), tiny), LIMITS) == outside


def test_what_cannot_be_checked(tiny):
    assert compare(dish(FLOUR, carb=None), tiny) is None
    assert disagreements(compare(dish(DUST, DUST), tiny), LIMITS) is None
    # small in mass, large in energy
    butter = labelled("moon butter", 20, 180, 20, 0, 0)
    found = compare(dish(FLOUR, butter), tiny)
    assert found.mass_coverage > 0.8
    assert disagreements(found, LIMITS) is None
    # a dish that weighs more than what is listed
    assert disagreements(compare(dish(FLOUR, mass=200), tiny), LIMITS) is None


def test_a_dish_without_ingredients(tiny):
    found = compare(dish(mass=100.0, energy=100.0, fat=1.0, protein=1.0, carb=1.0), tiny)
    assert disagreements(found, LIMITS) is None


def test_records_that_label_the_dish_alone(tiny):
    """A recipe for four, a plate of one: the lines tell the mixture, the label's mass how much of it."""
    lines = (Ingredient("flour", 400.0, "g"), Ingredient("oil", 100.0, "g"))
    record = FoodRecord("d", "d.jpg", "s", ingredients=lines, nutrition=Nutrition(125, 570, 26, 10, 75))
    found = compare(record, tiny)
    assert found.usda["energy"] == pytest.approx((4 * 350 + 884) / 4)
    assert found.usda["fat"] == pytest.approx((4 * 1 + 100) / 4)
    assert found.mass_coverage == 1
    assert disagreements(found, LIMITS) == []
    # a line without grams takes from what is told
    more = FoodRecord("d", "d.jpg", "s", ingredients=(*lines, Ingredient("egg")), nutrition=record.nutrition)
    assert compare(more, tiny).mass_coverage == pytest.approx(2 / 3)


def test_salt_to_taste_is_told(parser):
    common = tiny_common() | {"salt": CommonFood("salt", "00012", "00012", "", "")}
    salt = Food("00012", "Salt, test", "Spices", 0, 0, 0, 0)
    estimator = Estimator(FoodTable({**tiny_table().foods, "00012": salt}), "recipe", common)
    found = compare(dish(FLOUR, Ingredient("salt", text="salt to taste")), estimator)
    assert found.mass_coverage == 1
    assert found.usda == {"energy": 350, "fat": 1, "protein": 10, "carb": 75}


def test_automatic_foods_count_only_if_asked(tiny):
    squash = labelled("winter squash", 100, 40, 0.1, 1, 10)
    assert compare(dish(squash), tiny).mass_coverage == 0
    assert compare(dish(squash), tiny, automatic=True).mass_coverage == 1


def test_audit_by_hand(tiny):
    heavy = labelled("flour", 100, 450, 1, 10, 75)
    light = labelled("flour", 100, 300, 1, 10, 75)
    result = Audit(tiny, LIMITS).add_all([dish(heavy, light), dish(OIL), dish(DUST)]).result()
    grains = result["groups"]["Grains"]
    assert grains["count"] == 2
    assert grains["pmae"]["energy"] == pytest.approx(100 * 150 / 700)
    assert grains["bias"]["energy"] == pytest.approx(100 * 50 / 700)
    assert grains["mass_share"] == pytest.approx(200 / 260)
    assert result["groups"]["(no trusted food)"]["count"] == 1
    assert result["groups"]["Fats"]["pmae"]["protein"] is None  # nothing to be off from
    assert result["counts"]["dishes_checked"] == 2
    assert result["counts"]["dishes_not_checkable"] == 1
    assert result["dishes"]["pmae"]["energy"] == pytest.approx(100 * (50 + 42) / (700 + 442))
    assert [row["name"] for row in result["worst"]] == ["flour", "oil"]
    assert result["worst"][0]["energy_error"] == 150
    assert result["untold"] == {"stardust": 1}
    json.dumps(result)


def test_the_table_lacks_a_food(parser):
    """Foundation foods alone have no olive oil: neither the label nor the name is at fault."""
    foods = {id: food for id, food in tiny_table().foods.items() if id != "00005"}
    estimator = Estimator(FoodTable(foods), "recipe", tiny_common())
    assert estimator.estimate(OIL).lacks == tiny_common()["oil"]
    assert estimator.estimate(FLOUR).lacks is None
    assert estimator.estimate(DUST).lacks is None
    by_number = Ingredient("oil", text="2 oils")
    assert estimator.estimate(by_number).grams.how == "the table lacks the food"
    result = Audit(estimator, LIMITS).add_all([dish(FLOUR, OIL), dish(OIL), dish(DUST)]).result()
    assert result["lacking"] == {"oil (00005)": 2}
    assert result["untold"] == {"stardust": 1}
    assert result["counts"]["ingredients_lacking"] == 2
    assert result["counts"]["dishes_not_checkable"] == 3
    assert result["dishes"]["outside"] == {}
    text = audit_text(result)
    assert "ingredients whose food the table lacks, although it was chosen by hand: 2 of 4 (50.0 %)" in text
    assert (
        "foods that the table lacks: oil (00005) 2\n\nnames without a food chosen by hand: stardust 1" in text
    )
    assert "<h2>Foods that the table lacks</h2>" in audit_html(result, "a")
    # the nearest description is no food to compare the label with, even where automatic ones are trusted
    dressing = Food("00099", "Dressing, oil, test", "Fats", 400, 40, 0, 5)
    nearest = Estimator(FoodTable({**foods, "00099": dressing}), "recipe", tiny_common())
    assert nearest.estimate(OIL).match.food == dressing
    assert compare(dish(OIL), nearest, automatic=True).mass_coverage == 0
    assert "Fats" not in Audit(nearest, LIMITS, automatic=True).add_all([dish(OIL)]).result()["groups"]
    # what rice is on a plate has another number than what it is in a recipe
    foods = {id: food for id, food in tiny_table().foods.items() if id != "00008"}
    served = Estimator(FoodTable(foods), "served", tiny_common())
    rice = labelled("rice", 100, 130, 0.2, 2.5, 28)
    assert Audit(served, LIMITS).add_all([dish(rice)]).result()["lacking"] == {"rice (00008)": 1}
    recipe = Estimator(FoodTable(foods), "recipe", tiny_common())
    assert Audit(recipe, LIMITS).add_all([dish(rice)]).result()["lacking"] == {}


def test_audit_report(tiny):
    bad = labelled("<b>flour", 100, 450, 1, 10, 75, text="100 g flour")
    result = Audit(tiny, LIMITS).add_all([dish(bad)]).result()
    text = audit_text(result)
    assert "dishes that agree: 1 of 1 (100.0 %)" in text
    assert "Grains" in text
    page = audit_html(result, "a & b")
    assert "<b>" not in page
    assert "&lt;b&gt;flour" in page
    assert "a &amp; b" in page


@pytest.mark.data
@pytest.mark.usefixtures("parser")
def test_real_household_measures(rode_data):
    estimator = Estimator(load_foods(rode_data / "usda"))
    expected = {
        "1 cup all-purpose flour": ("20081", 125),
        "2 eggs": ("01123", 100),
        "3 cloves garlic, minced": ("11215", 9),
        "1/2 cup olive oil": ("04053", 108),
        "2 tbsp butter": ("01001", 2 * 227 / 16),
        "1 large onion, chopped": ("11282", 150),
        "2 sticks butter": ("01001", 226),
        "1 cup cooked rice": ("20045", 158),
        "400 g penne": ("20120", 400),
        "1 (14 oz) can coconut milk": ("12118", 14 * 28.349523125),
    }
    for text, (id, grams) in expected.items():
        found = estimator.estimate(Ingredient("x", text=text))
        assert found.match.food.id == id, text
        assert found.trusted, text
        assert found.grams.grams == pytest.approx(grams), text
