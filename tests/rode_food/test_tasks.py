from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rode_food.nutrition_text import format_nutrition
from rode_food.records import FoodRecord, Ingredient, Nutrition, Turn
from rode_food.tasks import QUESTIONS, TASKS, make_examples, parse_answer, question

RECORD = FoodRecord(
    id="dish",
    image="/x/dish.jpg",
    source="s",
    title="Egg on rice",
    category="meat_dish",
    ingredients=(
        Ingredient("White rice"),
        Ingredient("butter, cut into slices"),
        Ingredient("salt and pepper"),
        Ingredient("white rice"),
    ),
    instructions=("Boil  the\nrice.", "2. Serve."),
    nutrition=Nutrition(320.4, 409.6, 12.04, 9.96, 0.44),
    split="test",
)


def by_task(record: FoodRecord) -> dict:
    return {example.task: example for example in make_examples(record)}


def test_answers_of_each_task() -> None:
    examples = by_task(RECORD)
    assert tuple(examples) == TASKS
    assert examples["ingredients"].answer == "White rice, butter cut into slices, salt and pepper"
    assert examples["ingredients"].reference == ["White rice", "butter cut into slices", "salt and pepper"]
    assert examples["recipe"].answer == "Boil the rice.\nServe."
    assert examples["recipe"].reference == ["Boil the rice.", "Serve."]
    assert (
        examples["nutrition"].answer
        == "mass 320 g, energy 410 kcal, fat 12 g, protein 10 g, carbohydrate 0.4 g"
    )
    assert examples["nutrition"].reference == {
        "mass": 320.4,
        "energy": 409.6,
        "fat": 12.04,
        "protein": 9.96,
        "carb": 0.44,
    }
    assert examples["category"].answer == examples["category"].reference == "meat dish"
    for example in examples.values():
        assert (example.record_id, example.image, example.source, example.split) == (
            "dish",
            "/x/dish.jpg",
            "s",
            "test",
        )
        assert example.question == question(example.task)


@pytest.mark.parametrize(
    ("record", "tasks"),
    [
        (FoodRecord("a", "/a.jpg", "s"), []),
        (FoodRecord("a", "/a.jpg", "s", ingredients=(Ingredient("..."),)), []),
        (FoodRecord("a", "/a.jpg", "s", nutrition=Nutrition(energy=519.0)), []),
        (FoodRecord("a", "/a.jpg", "s", nutrition=Nutrition(1.0, 0.0, 0.0, 0.0, 0.0)), ["nutrition"]),
        (FoodRecord("a", "/a.jpg", "s", category="soup"), ["category"]),
    ],
)
def test_a_record_answers_only_what_it_knows(record: FoodRecord, tasks: list[str]) -> None:
    assert list(by_task(record)) == tasks


def test_wordings() -> None:
    every = make_examples(RECORD, ["category", "recipe"], wording="all")
    assert [e.question for e in every] == [*QUESTIONS["category"], *QUESTIONS["recipe"]]
    records = [FoodRecord(f"r{i}", "/a.jpg", "s", category="soup") for i in range(200)]

    def chosen(seed: int) -> list[str]:
        return [make_examples(r, ["category"], wording="random", seed=seed)[0].question for r in records]

    assert chosen(0) == chosen(0) != chosen(1)
    counts = [chosen(0).count(text) for text in QUESTIONS["category"]]
    assert sum(counts) == 200
    assert min(counts) > 20  # 40 each is expected; 20 is 3.5 standard deviations off
    # known values: another Python or machine must not ask otherwise
    assert [QUESTIONS["category"].index(text) for text in chosen(0)[:6]] == [3, 4, 4, 2, 2, 1]


def test_bad_arguments() -> None:
    with pytest.raises(
        ValueError, match="task: expected one of ingredients, recipe, nutrition, category, question, got 'x'"
    ):
        make_examples(RECORD, ["x"])
    with pytest.raises(ValueError, match="wording: expected one of first, all, random, got 'last'"):
        make_examples(RECORD, wording="last")
    with pytest.raises(ValueError, match=r"record 'a': image 'a\.jpg' is relative"):
        make_examples(FoodRecord("a", "a.jpg", "s"))
    with pytest.raises(ValueError, match="task: expected"):
        question("x")
    with pytest.raises(ValueError, match="nutrition, category, got 'question'"):
        question("question")
    with pytest.raises(ValueError, match="task: expected"):
        parse_answer("x", "")


amounts = st.floats(0, 99999, allow_nan=False)


@settings(max_examples=200, deadline=None)
@given(st.fixed_dictionaries(dict.fromkeys(("mass", "energy", "fat", "protein", "carb"), amounts)))
def test_nutrition_answer_to_parse(values: dict[str, float]) -> None:
    parsed = parse_answer("nutrition", format_nutrition(values))
    assert parsed is not None
    for name, value in values.items():
        assert abs(parsed[name] - value) <= (0.5 if value >= 9.95 else 0.05) + 1e-9


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=15)


@settings(max_examples=200, deadline=None)
@given(st.lists(names, max_size=5), st.lists(names, max_size=4), st.none() | names.filter(str.strip))
def test_answers_parse_to_their_reference(items: list[str], steps: list[str], category: str | None) -> None:
    record = FoodRecord(
        "a",
        "/a.jpg",
        "s",
        category=category,
        ingredients=tuple(map(Ingredient, items)),
        instructions=tuple(steps),
    )
    for example in make_examples(record):
        assert parse_answer(example.task, example.answer) == example.reference


FULL = {"mass": 320.0, "energy": 410.0, "fat": 12.0, "protein": 18.0, "carb": 55.0}


@pytest.mark.parametrize(
    "text",
    [
        "mass 320 g, energy 410 kcal, fat 12 g, protein 18 g, carbohydrate 55 g",
        "Carbohydrates: 55g; proteins: 18g; fats: 12g; calories: 410; weight: 320g.",
        "The dish weighs about 320 g and has 410 kcal, with 12 g of fat, 18g protein and 55 grams of carbs.",
        "- Mass: 0.32 kg\n- Energy: 410 kcal (1715 kJ)\n- Fat: 12000 mg\n- Protein: 18 g\n- Carbs: 55 g",
        "energy 1715.44 kJ, mass 320 grams, fat 12.0 g, protein 18 g, carb 55 g",
        "| mass | 320 g |\n| energy | 410 kcal |\n| fat | 12 g |\n| protein | 18 g |\n| carbohydrate | 55 g |",
        "12 g fat 18 g protein 55 g carbohydrate 410 calories 320 g weight",
        "It contains 10-14 g fat (saturated fat 3 g), 18 g protein, 55 g carbs, 410 cal. Total mass = 320 g",
        "Mass\n320 g\nEnergy\n410 kcal\nFat\n12 g\nProtein\n18 g\nCarbohydrate\n55 g",
        "MASS 320 G, ENERGY 410 KCAL, FAT 12 G, PROTEIN 18 G, CARBOHYDRATE 55 G, fat 99 g",
    ],
)
def test_nutrition_in_other_words(text: str) -> None:
    parsed = parse_answer("nutrition", text)
    assert parsed is not None
    assert parsed == pytest.approx(FULL)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", None),
        ("I cannot tell.", None),
        ("mass, energy, fat", None),
        ("20% fat", None),
        ("fat 410 kcal", {"energy": 410.0}),
        ("energy 12 g, protein 12 kcal", {"energy": 12.0}),
        ("mass 1,234 g, fat 12,5 g", {"mass": 1234.0, "fat": 12.5}),
        ("fat-free, protein 3", {"protein": 3.0}),
        ("mass 1 lb, fat 1 oz", {"mass": 453.59237, "fat": 28.349523125}),
        ("fat " + "9" * 400 + " g", None),
        ("protein nan g, fat inf g", None),
    ],
)
def test_nutrition_in_part(text: str, found: dict[str, float] | None) -> None:
    parsed = parse_answer("nutrition", text)
    assert (parsed and {name: value for name, value in parsed.items() if value is not None}) == found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rice, salt and pepper, Egg, rice", ["rice", "salt and pepper", "Egg"]),
        ("The ingredients in this dish are rice, beans, and corn.", ["rice", "beans", "corn"]),
        ("鸡蛋、葱，盐；油", ["鸡蛋", "葱", "盐", "油"]),
        ("بيض، ملح؛ زيت", ["بيض", "ملح", "زيت"]),
        ("This dish contains rice, eggs and peas. It is tasty.", ["rice", "eggs", "peas"]),
        ("Ingredients: rice, salt and pepper.", ["rice", "salt and pepper"]),
        ("Ingredients:\n1. rice\n2. salt and pepper\n", ["rice", "salt and pepper"]),
        ("- white rice\n* egg\n• oil", ["white rice", "egg", "oil"]),
        ("rice; egg;", ["rice", "egg"]),
        ("", None),
        (" .,; ", None),
    ],
)
def test_ingredients_in_other_words(text: str, expected: list[str] | None) -> None:
    assert parse_answer("ingredients", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Soup", "soup"),
        ("This is a soup.", "soup"),
        ("Category: Meat_dish", "meat dish"),
        ("The category of this dish is dessert.", "dessert"),
        ("It belongs to the salads", "salads"),
        ("  ", None),
    ],
)
def test_category_in_other_words(text: str, expected: str | None) -> None:
    assert parse_answer("category", text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Boil.\n\nServe.", ["Boil.", "Serve."]),
        ("1. Boil rice. 2. Fry egg. 3. Serve.", ["Boil rice.", "Fry egg.", "Serve."]),
        ("Step 1: Boil.\nStep 2: Serve.", ["Boil.", "Serve."]),
        ("\n", None),
    ],
)
def test_recipe_in_other_words(text: str, expected: list[str] | None) -> None:
    assert parse_answer("recipe", text) == expected


TURNS = (
    Turn("What is it?", "A soup."),
    Turn("Is it hot?\nSay yes or no.", "Yes."),
    Turn("Why?", " It steams."),
)


def test_questions_of_the_records_own_have_the_earlier_turns_before_them() -> None:
    record = dataclasses.replace(RECORD, more_images=("/x/side.jpg",), conversation=TURNS)
    found = make_examples(record, ["question"], wording="random", seed=3)
    assert [(e.question, e.answer, e.reference) for e in found] == [
        ("What is it?", "A soup.", "A soup."),
        ("What is it?\nA soup.\n\nIs it hot?\nSay yes or no.", "Yes.", "Yes."),
        (
            "What is it?\nA soup.\n\nIs it hot?\nSay yes or no.\nYes.\n\nWhy?",
            " It steams.",
            " It steams.",
        ),
    ]
    assert found == make_examples(record, ["question"], wording="all")
    assert {e.images for e in make_examples(record)} == {("/x/dish.jpg", "/x/side.jpg")}
    assert [e.task for e in make_examples(record)] == [*TASKS, *["question"] * 3]
    assert parse_answer("question", "  Yes.\n") == "Yes."
    assert parse_answer("question", " \n") is None


def test_without_a_picture_only_the_records_own_questions_are_asked() -> None:
    record = dataclasses.replace(RECORD, image="", conversation=TURNS)
    assert [(e.task, e.image, e.images) for e in make_examples(record)] == [("question", "", ())] * 3
    with pytest.raises(ValueError, match=r"record 'a': image 'b\.jpg' is relative"):
        make_examples(FoodRecord("a", "/a.jpg", "s", more_images=("b.jpg",)))
