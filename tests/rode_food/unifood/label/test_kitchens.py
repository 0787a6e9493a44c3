"""True answers about lines of real kitchens are not refused for the mass that their line states."""

from __future__ import annotations

import json
import unicodedata

import pytest
from PIL import Image

from rode_food.records import Ingredient
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.validate import check_answer, stated_grams
from rode_food.unifood.label.work import fingerprint
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


def test_pictures_as_they_come(tmp_path):
    """Their names in either Unicode form, their sides as they are sent; whatever Pillow raises is a reason, not an end."""
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.new("RGB", (40, 20)).save(tmp_path / unicodedata.normalize("NFD", "crème.jpg"), exif=exif)
    (tmp_path / "a.dds").write_bytes(b"DDS " + (124).to_bytes(4, "little") + bytes(range(120)) * 4)
    paths = [tmp_path / unicodedata.normalize("NFC", "crème.jpg"), tmp_path / "a.dds", tmp_path / "none.jpg"]
    rows = fingerprint("basis", [json.dumps([str(path), ["2 eggs"]]) for path in paths])
    (key, *size), odd, missing = map(json.loads, rows)
    assert len(key) == 32
    assert size == [20, 40]
    assert odd[0] == missing[0] == ""
    assert "No such file" in missing[1]
