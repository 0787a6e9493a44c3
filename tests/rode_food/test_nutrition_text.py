from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.nutrition_text import parse_nutrition

FIELDS = ("mass", "energy", "fat", "protein", "carb")
PLATE = {"mass": 200.0, "energy": 250.0, "fat": 2.0, "protein": 20.0, "carb": 30.0}
ROWS = [("Fat", 2, "g"), ("Protein", 20, "g"), ("Carbs", 30, "g"), ("Calories", 250, ""), ("Mass", 200, "g")]
REST = {"carbohydrates": "30 g", "protein": "20g", "weight": "0.2 kg"}
PIECES = ["fat", "1", "200", "g", ",", "{", '"', ":", "kcal", "-", "<think>", "."]
NUMBERS = {"mass_g": 200, "energy_kcal": 250, "fat_g": 2, "protein_g": 20, "carb_g": 30}


@pytest.mark.parametrize(
    "text",
    [
        "A low-fat yogurt bowl of 200 g: energy 250 kcal, fat 2 g, protein 20 g, carbs 30 g",
        "low-fat yogurt 200 g, energy 250 kcal, protein 20 g, carbs 30 g, fat 2 g",
        "Low fat yogurt, 200 g: 250 kcal, 2 g fat, 20 g protein, 30 g carbs",
        "A high-protein bowl: mass 200 g, energy 250 kcal, fat 2 g, protein 20 g, carbs 30 g",
        json.dumps(NUMBERS),
        json.dumps({key: str(value) for key, value in NUMBERS.items()}),
        "```json\n" + json.dumps(NUMBERS, indent=2) + "\n```",
        "Here it is: " + json.dumps({"nutrition": NUMBERS}) + " Enjoy!",
        json.dumps({"fat": {"value": 2, "unit": "g"}, "energy": {"value": 1046, "unit": "kJ"}, **REST}),
        json.dumps([{"name": name, "amount": amount, "unit": unit} for name, amount, unit in ROWS]),
        json.dumps({"ingredients": [{"name": "rice", "fat_g": 1, "mass_g": 50}], **NUMBERS}),
        json.dumps({"energyKJ": 1046, "massG": 200, "fatG": 2, "proteinG": 20, "carbG": 30}),
        '{"mass_g": 200, "energy_kcal": 250, "fat_g": 2, "protein_g": 20, "carb_g": 30',
        "Calories 250 Calories from Fat 18 Total Fat 2g Protein 20g Total Carbohydrate 30g Weight 200g",
        "Serving Size 1 cup (200g) Calories 250 Calories from Fat 18 Total Fat 2g Saturated Fat 1g Trans Fat 0g "
        "Cholesterol 5mg Sodium 40mg Total Carbohydrate 30g Dietary Fiber 3g Sugars 12g Protein 20g",
        "mass 200 g, energy 1046 kJ, fat 1-3 g, protein 18 to 22 g, carbohydrate 25–35 g",
        "mass 190 g - 210 g, energy 240-260 kcal, fat 2 g, protein 20 ± 2 g, carbohydrate 30 g",
        "<think>fat 99 g? energy 1 kcal</think>mass 200 g, energy 250 kcal, fat 2 g, protein 20 g, carbohydrate 30 g",
        "The fat may be 99 g.</think>\nmass 200 g, energy 250 kcal, fat 2 g, protein 20 g, carbohydrate 30 g",
        "mass 200,0 g; energy 250,0 kcal; fat 2,00 g; protein 20,0 g; carbohydrate 30,000 mg",
        "Mass (g): 200\nEnergy (kJ): 1046\nFat (g): 2\nProtein (g): 20\nCarbs (g): 30",
        "| Mass (g) | 200 |\n| Energy (kcal) | 250 |\n| Fat | 2 |\n| Protein | 20 |\n| Carbs | 30 |",
        "**Mass:** 200 g\n**Energy:** 250 kcal\n**Fat:** 2 g, of which saturates 1 g\n"
        "**Protein:** 20 g\n**Carbohydrate:** 30 g, of which sugars 9 g",
    ],
)  # fmt: skip
def test_answers_in_many_forms(text):
    parsed = parse_nutrition(text)
    assert parsed is not None
    assert parsed == pytest.approx(PLATE, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("mass 1 200 g, energy 2 500 kcal", {"mass": 1200, "energy": 2500}),
        ("mass 1\u202f200,5 g", {"mass": 1200.5}),
        ("mass 1,234.5 g", {"mass": 1234.5}),
        ("mass 1.234,5 g", {"mass": 1234.5}),
        ("mass 1'200 g", {"mass": 1200}),
        ("mass 1e3 g, energy 2.5e2 kcal", {"mass": 1000, "energy": 250}),
        ("mass 1e3x g", None),
        ("mass -5 g, energy 90 kcal, fat −2 g, protein 3 g", {"energy": 90, "protein": 3}),
        ("-5 g of fat, 90 kcal", {"energy": 90}),
        ('{"mass_g": -5, "fat_g": 2}', {"fat": 2}),
        ("fat 10-12 g, protein 10 - 12 g, mass: 200–300 g", {"fat": 11, "protein": 11, "mass": 250}),
        ("- 5 g fat\n- 12 g protein", {"fat": 5, "protein": 12}),
        ("mass 0,125 kg", {"mass": 125}),
        ("low-fat yogurt 150 g, energy 90 kcal, fat 2 g", {"mass": 150, "energy": 90, "fat": 2}),
        ("fat-free milk: 35 kcal per 100 g", {"energy": 35}),
        ('{"calories_from_fat": 18, "sugars_g": 3}', None),
        ("saturated fat 3 g", None),
        ("<think>fat 3 g", None),
        ('{"fat_g": null, "protein_g": true, "carb_g": 3}', {"carb": 3}),
        ('{"fat_g": 1e400}', None),
        ("{" * 2000, None),
    ],
)
def test_parts_and_number_formats(text, found):
    parsed = parse_nutrition(text)
    assert (parsed and {k: v for k, v in parsed.items() if v is not None}) == (
        None if found is None else pytest.approx(found)
    )


def _grouped(value: float, group: str, point: str) -> str:
    whole, _, part = f"{value:.1f}".partition(".")
    text = f"{int(whole):,}".replace(",", group)
    return text if part == "0" else f"{text}{point}{part}"


FORMATS = {
    "plain": lambda v: f"{v:g}" if v < 1e5 else f"{v:.1f}",
    "english": lambda v: _grouped(v, ",", "."),
    "space": lambda v: _grouped(v, " ", ","),
    "thin": lambda v: _grouped(v, "\u202f", "."),
    "swiss": lambda v: _grouped(v, "'", "."),
    "comma": lambda v: f"{v:.1f}".replace(".", ","),
    "range": lambda v: f"{v - 0.1:.1f}-{v + 0.1:.1f}" if v >= 1 else f"{v:.1f}",
}
WORDS = {
    "mass": ("mass", "Weight", "MASS"),
    "energy": ("energy", "Calories", "Energy"),
    "fat": ("fat", "Total Fat", "fats"),
    "protein": ("protein", "Proteins", "PROTEIN"),
    "carb": ("carbohydrate", "carbs", "Total Carbohydrate"),
}
UNITS = {
    "energy": {"kcal": 1.0, "kJ": 4.184, "kilocalories": 1.0},
    "": {"g": 1.0, "grams": 1.0, "mg": 1000.0, "kg": 1e-3},
}
SHAPES = {
    "list": ("{word} {number} {unit}", ", "),
    "colon": ("{word}: {number} {unit}", "; "),
    "lines": ("- **{word}:** {number} {unit}", "\n"),
    "table": ("| {word} | {number} {unit} |", "\n"),
    "head": ("{word} ({unit}): {number}", "\n"),
    "reverse": ("{number} {unit} of {word}", ", "),
    "label": ("{word} {number} {unit}", " "),
    "json": ('"{word}": "{number} {unit}"', ", "),
    "json keys": ('"{word}_{unit}": "{number}"', ", "),
}


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_answer_that_can_be_written_reads_back(data):
    values = {f: data.draw(st.integers(0, 99_999).map(lambda n: n / 10), f) for f in FIELDS}
    order = data.draw(st.permutations(FIELDS))
    shape = data.draw(st.sampled_from(sorted(SHAPES)))
    pattern, between = SHAPES[shape]
    number = FORMATS[data.draw(st.sampled_from(sorted(FORMATS)))]
    parts = []
    for name in order:
        units = UNITS["energy" if name == "energy" else ""]
        unit = data.draw(st.sampled_from(sorted(units)))
        # so that one decimal is enough
        unit = unit if unit not in ("kg",) or values[name] >= 1000 else "g"
        scaled = round(values[name] * units[unit], 1)
        values[name] = scaled / units[unit]
        parts.append(
            pattern.format(word=data.draw(st.sampled_from(WORDS[name])), number=number(scaled), unit=unit)
        )
    text = between.join(parts)
    text = "{" + text + "}" if shape.startswith("json") else text
    think = data.draw(st.sampled_from(["", '<think>fat 3 g, {"mass_g": 5}</think>\n', "A low-fat plate. "]))
    parsed = parse_nutrition(think + text)
    assert parsed is not None, text
    assert parsed == pytest.approx(values, rel=1e-6, abs=1e-6), text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join))
def test_any_text_gives_numbers_or_none(text):
    parsed = parse_nutrition(text)
    assert parsed is None or all(v is None or 0 <= v < float("inf") for v in parsed.values())
