"""True answers about lines of real kitchens are not refused for the mass that their line states."""

from __future__ import annotations

import json

import pytest

from rode_food.records import Ingredient
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.validate import check_answer, stated_grams
from tagger import need_tagger

GRAMS = {
    "1/4 cup (30 g) flour": 30.0,
    "2 cups (250 g) flour": 250.0,
    "1,000 g potatoes": 1000.0,
    "200 g beef": 200.0,
    "1 lb 8 oz beef": 680.388555,
    "2 (10 oz.) pkgs. spinach": 566.9904625,
    "2 cans (400 g each) tomatoes": 800.0,
    "3/4 cup (90 g) oats": 90.0,
}


@pytest.mark.parametrize(("line", "grams"), GRAMS.items())
def test_a_true_answer_is_taken(line, grams):
    need_tagger()
    ingredient = Ingredient(line.split()[-1], text=line)
    assert stated_grams(ingredient) == pytest.approx(grams)
    entry = {"number": 1, "mass_g": grams, "energy_kcal": grams * 1.65, "fat_g": grams * 0.05}
    entry |= {"protein_g": grams * 0.1, "carbohydrate_g": grams * 0.2, "micronutrients": []}
    found, problems = check_answer(json.dumps({"ingredients": [entry]}), [ingredient], LabelSettings())
    assert (len(found), problems) == (1, [])
