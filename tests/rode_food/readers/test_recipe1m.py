from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import made_up_recipe1m as made_up
from published_layouts import (
    det_ingrs,
    layer1,
    layer2,
    recipe_picture,
    with_nutrition,
    write_array,
    write_recipes,
)
from rode_food.convert import convert
from rode_food.readers import guess_kind, read_source
from rode_food.readers.log import ReadLog
from rode_food.records import FoodRecord, Ingredient, Nutrition, Quantity, RecordError, read_records

A, B, C = "00aa000001", "00aa000002", "00aa000003"
PICTURE, OTHER, THIRD = "0fa8309c13.jpg", "1fa8309c13.jpg", "2fa8309c13.jpg"


def read(folder: Path, kind: str = "recipe1m", **options: int | bool) -> tuple[list[FoodRecord], ReadLog]:
    log = ReadLog()
    return list(read_source(kind, folder, log, **options)), log


def test_a_recipe(tmp_path: Path) -> None:
    names = det_ingrs(A, All_Purpose_flour=True, top=True, salt=False)
    write_recipes(tmp_path, [layer1(A)], [layer2(A, PICTURE)], [names])
    picture = recipe_picture(tmp_path, PICTURE)
    records, log = read(tmp_path)
    assert records == [
        FoodRecord(
            id=A,
            image=str(picture),
            source="recipe1m",
            title=f"Dish {A}",
            ingredients=(
                Ingredient("all purpose flour", 2.0, "cup", text="2 cups flour, sifted"),
                Ingredient(
                    "top", text="For the top:"
                ),  # the line is a heading, but the name is said to be valid
                Ingredient("salt", text="Salt to taste"),  # the line's own name, for det_ingrs' is not valid
            ),
            instructions=("Mix it.", "Bake it."),
            split="train",
        )
    ]
    assert not log.counts
    assert not log.notes


@pytest.mark.parametrize(
    "names",
    [
        None,  # no entry for this recipe
        {"id": A, "valid": [True], "ingredients": [{"text": "sugar"}]},  # lists that do not align
        {"id": A, "valid": 1, "ingredients": 2},
        {"id": A, "valid": [True] * 3, "ingredients": [{"text": " "}, 5, {}]},
    ],
)
def test_names_that_do_not_fit_the_lines_are_not_used(tmp_path: Path, names: dict | None) -> None:
    write_recipes(tmp_path, [layer1(A)], [layer2(A, PICTURE)], [names] if names else [])
    recipe_picture(tmp_path, PICTURE)
    (record,), _ = read(tmp_path)
    assert [i.name for i in record.ingredients] == ["flour", "salt"]


@pytest.mark.parametrize(
    "below", ["images", "images/{split}", "recipe1M_images_{split}", "recipe1M_images_{split}/{split}"]
)
@pytest.mark.parametrize("json_below", ["", "recipe1M", "recipe1M_layers"])
def test_where_pictures_and_layers_may_lie(tmp_path: Path, below: str, json_below: str) -> None:
    recipes = [layer1(A), layer1(B, partition="test"), layer1(C, partition="val")]
    write_recipes(
        tmp_path / json_below, recipes, [layer2(A, PICTURE), layer2(B, OTHER), layer2(C, THIRD)], []
    )
    pictures = [
        recipe_picture(tmp_path, name, below.format(split=split))
        for name, split in ((PICTURE, "train"), (OTHER, "test"), (THIRD, "val"))
    ]
    records, log = read(tmp_path)
    assert [(r.split, r.image) for r in records] == [
        (split, str(picture)) for split, picture in zip(("train", "test", "val"), pictures, strict=True)
    ]
    assert not log.counts
    assert guess_kind(tmp_path) == "recipe1m"


def test_several_pictures(tmp_path: Path) -> None:
    write_recipes(tmp_path, [layer1(A)], [layer2(A, "ffff.jpg", PICTURE, PICTURE, OTHER, THIRD)], [])
    found = [recipe_picture(tmp_path, name) for name in (PICTURE, OTHER, THIRD)]
    for count, ids in ((1, [A]), (2, [A, f"{A}_2"]), (9, [A, f"{A}_2", f"{A}_3"])):
        records, _ = read(tmp_path, images_per_recipe=count)
        assert [r.id for r in records] == ids  # what is not on disk does not count
        assert [r.image for r in records] == list(map(str, found[:count]))


def test_layer2_plus_is_preferred(tmp_path: Path) -> None:
    write_recipes(tmp_path, [layer1(A)], [layer2(A, "ffff.jpg")], [])
    write_array(tmp_path / "layer2+.json", [layer2(A, PICTURE)])
    recipe_picture(tmp_path, PICTURE)
    assert len(read(tmp_path)[0]) == 1


def test_missing_layers(tmp_path: Path) -> None:
    write_array(tmp_path / "layer2.json", [])
    with pytest.raises(RecordError, match=r"^layer1: none of .*layer1\.json, .* exists$"):
        read(tmp_path)
    write_array(tmp_path / "layer1.json", [])
    (tmp_path / "layer2.json").unlink()
    with pytest.raises(RecordError, match=r"^layer2: none of .*layer2\+\.json, .*layer2\.json"):
        read(tmp_path)


def test_without_det_ingrs_it_goes_on_and_says_so_once(tmp_path: Path) -> None:
    write_recipes(tmp_path, [layer1(A), layer1(B)], [layer2(A, PICTURE), layer2(B, PICTURE)])
    recipe_picture(tmp_path, PICTURE)
    records, log = read(tmp_path)
    assert [[i.name for i in record.ingredients] for record in records] == [["flour", "salt"]] * 2
    assert log.notes == {
        "no det_ingrs.json: names come from the lines": 1,
        "a line that names no ingredient": 2,
    }


def test_faults(tmp_path: Path) -> None:
    """Each costs its own recipe alone, and is told with file and line."""
    lines = [
        layer1(A),
        layer1("01", instructions=[]),  # kept: it has ingredients
        layer1("02", ingredients=[], instructions=[{"text": " "}]),
        layer1("03", title="\udcff"),
        b'{"id": "04", "title": "\xff", "partition": "train", "ingredients": [], "instructions": []}',
        layer1(A, title="another"),
        layer1("06", partition="dev"),
        layer1("07"),
        layer1("08"),
        layer1("09"),
        layer1("10"),
        layer1("11"),
        layer1("12", ingredients="flour"),
        layer1("13", title=5),
        layer1("14", ingredients=[{"text": None}]),
        layer1(""),
        b"{broken",
        layer1("17", instructions=None, ingredients=None),
        layer1("18", ingredients=[{"text": "9" * 400 + " cups sugar"}], title=" "),
    ]
    pictures = [
        layer2(A, PICTURE),
        layer2("01", PICTURE),
        layer2("07", "../../../x.jpg"),
        layer2("08", "/etc/passwd"),
        layer2("09"),
        layer2("10", "ffff.jpg"),
        {"id": "11", "images": {}},
        layer2("18", PICTURE),
    ]
    write_recipes(tmp_path, lines, pictures, [])
    recipe_picture(tmp_path, PICTURE)
    records, log = read(tmp_path)
    assert [r.id for r in records] == [A, "01", "18"]
    assert records[1].instructions == ()
    assert records[2].title is None
    assert records[2].ingredients == (Ingredient("sugar", None, "cup", text="9" * 400 + " cups sugar"),)
    assert sorted(str(p).removeprefix(f"{tmp_path}/").split(": '")[0] for p in log.problems) == [
        "layer1.json:10: no picture",
        "layer1.json:11: no picture on disk: ffff.jpg",
        "layer1.json:13: ingredients that are no list",
        "layer1.json:14: a title that is no text: 5",
        "layer1.json:15: an entry of ingredients that is no text: None",
        "layer1.json:16: no id",
        "layer1.json:17: invalid JSON: Expecting property name enclosed in double quotes",
        "layer1.json:18: neither ingredients nor instructions",
        "layer1.json:3: neither ingredients nor instructions",
        "layer1.json:4: invalid UTF-16: half a surrogate pair in a \\u escape",
        "layer1.json:5: invalid UTF-8: invalid start byte at byte "
        + str((tmp_path / "layer1.json").read_bytes().index(b"\xff")),
        f"layer1.json:6: an id that stands twice: {A}",
        "layer1.json:7: an unknown partition",
        "layer2.json:3: a picture outside its folder",
        "layer2.json:4: a picture outside its folder",
        "layer2.json:7: images that are no list",
    ]
    assert log.counts.total() - log.broken.total() == 4
    with pytest.raises(RecordError, match=r"layer1\.json:4: invalid UTF-16"):
        list(read_source("recipe1m", tmp_path, ReadLog(strict=True)))
    done = convert("recipe1m", tmp_path, tmp_path / "out.jsonl")
    assert done.written == {"train": 3}
    assert len(list(read_records(tmp_path / "out.jsonl"))) == 3


def test_a_picture_that_a_link_in_its_name_would_reach(tmp_path: Path) -> None:
    for name in (
        "..",
        "a/../../b.jpg",
        "a\\b.jpg",
        ".hidden.jpg",
        "C:x.jpg",
        "abc",
        "ab.c.jpg",
        "a b\n.jpg",
        "",
        5,
    ):
        write_recipes(tmp_path, [layer1(A)], [{"id": A, "images": [{"id": name}]}], [])
        records, log = read(tmp_path)
        assert records == []
        assert log.broken.total() == 1, name


@pytest.mark.parametrize("images", ["images", "images/{partition}"])
@pytest.mark.parametrize("per_line", [True, False])
def test_the_made_up_one_is_read_as_it_was_written(tmp_path: Path, images: str, per_line: bool) -> None:
    folder = tmp_path / "r"
    made_up.write_recipe1m(folder, 60, seed=1, pictures=2, link="symbolic", images=images, per_line=per_line)
    log = ReadLog(strict=True)
    records = list(read_source("recipe1m", folder, log, images_per_recipe=2))
    assert not log.counts
    assert len(records) == 120
    assert made_up.digest(
        (r.id, r.title, len(r.ingredients), len(r.instructions)) for r in records[::2]
    ) == made_up.expected_digest(60, seed=1)
    for number, record in enumerate(records[::2]):
        entry = made_up.recipe(number, 1)
        assert [i.text for i in record.ingredients] == [item["text"] for item in entry["ingredients"]]
        assert record.split == entry["partition"]
        found = made_up.names(entry, number, 1)
        for ingredient, name, valid in zip(
            record.ingredients, found["ingredients"], found["valid"], strict=True
        ):
            assert not valid or ingredient.name == name["text"]
        assert Path(record.image).name == made_up.picture_name(record.id, 0)
    assert {record.split for record in records} == {"train", "val", "test"}


def test_recipes_with_nutrition(tmp_path: Path) -> None:
    write_array(tmp_path / "recipes_with_nutritional_info.json", [with_nutrition(A)])
    write_array(tmp_path / "layer2.json", [layer2(A, PICTURE)])
    picture = recipe_picture(tmp_path, PICTURE)
    assert guess_kind(tmp_path) == "recipe1m-plus"
    (record,), log = read(tmp_path, "recipe1m-plus")
    assert not log.counts
    assert not log.notes
    assert record.image == str(picture)
    assert (record.source, record.split, record.title) == ("recipe1m-plus", "test", "Oats")
    assert record.instructions == ("Roast.",)
    oats, oil = record.ingredients
    assert oats == Ingredient(
        "oats, rolled",
        amount=100.0,
        unit="g",
        mass=100.0,
        nutrition=Nutrition(
            mass=100.0,
            energy=380.0,
            fat=7.0,
            protein=13.0,
            carb=None,  # not 0
            micronutrients={
                "saturated fat": Quantity(1.2, "g"),
                "sugars": Quantity(1.0, "g"),
                "sodium": Quantity(6.0, "mg"),
            },
        ),
    )
    assert (oil.amount, oil.unit, oil.mass) == (1.5, "tbsp", 13.5)
    total = record.nutrition
    assert total is not None
    assert (total.mass, total.energy, total.fat, total.protein, total.carb) == (
        113.5,
        500.0,
        20.5,
        13.0,
        None,
    )
    # the publisher's values per 100 g, of which salt is sodium * 2.5 / 1000
    per_100g = with_nutrition(A)["nutr_values_per100g"]
    assert per_100g["energy"] * 113.5 / 100 == pytest.approx(total.energy)
    assert per_100g["salt"] * 113.5 / 100 == pytest.approx(total.micronutrients["sodium"].value * 2.5 / 1000)


def test_the_publishers_own_example_adds_up(tmp_path: Path) -> None:
    """Numbers of the example in im2recipe-Pytorch's README: values of an ingredient are of all of it, energy is kcal."""
    names = ("fat", "nrg", "pro", "sat", "sod", "sug")
    parts = [
        dict(zip(names, values, strict=True))
        for values in (
            (0.8845044, 133.80964, 23.1105124, 0.26535132, 81.64656, 7.3481904),
            (0.46, 49.0, 1.02, 0.023, 2.0, 7.43),
            (7.415, 149.25, 4.17, 1.207, 8.0, 6.04),
        )
    ]
    per_100g = {
        "energy": 81.12946131894766,
        "fat": 2.140139263515891,
        "protein": 6.914436593565536,
        "salt": 0.05597816738985967,
        "saturates": 0.36534716195613937,
        "sugars": 5.08634103436144,
    }
    entry = with_nutrition(
        A,
        ingredients=[{"text": "a"}, {"text": "b"}, {"text": "c"}],
        quantity=[{"text": "8"}, {"text": "1"}, {"text": "1/4"}],
        unit=[{"text": "ounce"}, {"text": "cup"}, {"text": "cup"}],
        weight_per_ingr=[226.796, 152.0, 30.5],
        nutr_per_ingredient=parts,
        nutr_values_per100g=per_100g,
    )
    write_array(tmp_path / "recipes_with_nutritional_info.json", [entry])
    write_array(tmp_path / "layer2.json", [layer2(A, PICTURE)])
    recipe_picture(tmp_path, PICTURE)
    (record,), log = read(tmp_path, "recipe1m-plus")
    assert not log.notes
    total = record.nutrition
    assert total is not None
    hundredths = (total.mass or 0.0) / 100
    for name, key in (("energy", "energy"), ("fat", "fat"), ("protein", "protein")):
        assert getattr(total, name) == pytest.approx(per_100g[key] * hundredths, rel=1e-6)
    micro = {name: quantity.value for name, quantity in total.micronutrients.items()}
    assert micro["saturated fat"] == pytest.approx(per_100g["saturates"] * hundredths, rel=1e-6)
    assert micro["sugars"] == pytest.approx(per_100g["sugars"] * hundredths, rel=1e-6)
    assert micro["sodium"] * 2.5 / 1000 == pytest.approx(per_100g["salt"] * hundredths, rel=1e-6)
    assert [(i.amount, i.unit) for i in record.ingredients] == [(8.0, "oz"), (1.0, "cup"), (0.25, "cup")]


def test_derived_carbohydrate(tmp_path: Path) -> None:
    write_array(tmp_path / "recipes_with_nutritional_info.json", [with_nutrition(A)])
    write_array(tmp_path / "layer2.json", [layer2(A, PICTURE)])
    recipe_picture(tmp_path, PICTURE)
    (record,), _ = read(tmp_path, "recipe1m-plus", derive_carb=True)
    oats, oil = (i.nutrition for i in record.ingredients)
    assert oats is not None
    assert oil is not None
    assert oats.carb == pytest.approx((380 - 9 * 7 - 4 * 13) / 4)
    assert oil.carb is None  # 120 - 9 * 13.5 < 0
    assert record.nutrition is not None
    assert record.nutrition.carb == pytest.approx((500 - 9 * 20.5 - 4 * 13) / 4)


@pytest.mark.usefixtures("tagger")
def test_faults_of_recipes_with_nutrition(tmp_path: Path) -> None:
    part = with_nutrition(A)["nutr_per_ingredient"][0]
    lines = [
        with_nutrition(A),
        with_nutrition("01", nutr_values_per100g={"energy": 999.0}),  # kept, but noted
        with_nutrition("02", weight_per_ingr=[100.0]),
        with_nutrition("03", nutr_per_ingredient=[part, {**part, "fat": -1.0}]),
        with_nutrition("04", nutr_per_ingredient=[part, {**part, "nrg": float("nan")}]),
        with_nutrition("05", nutr_per_ingredient=[part, {"nrg": 1.0}]),
        with_nutrition(A),
        with_nutrition("07", partition=None),
        with_nutrition("08", weight_per_ingr=["a", 1]),
        with_nutrition("09", nutr_per_ingredient=[part, 5]),
        with_nutrition(
            "10", ingredients=[], quantity=[], unit=[], weight_per_ingr=[], nutr_per_ingredient=[]
        ),
    ]
    path = write_array(tmp_path / "recipes_with_nutritional_info.json", lines)
    write_array(tmp_path / "layer2.json", [layer2(A, PICTURE), layer2("01", PICTURE)])
    recipe_picture(tmp_path, PICTURE)
    records, log = read(tmp_path, "recipe1m-plus")
    assert [r.id for r in records] == [A, "01"]
    assert [str(p).removeprefix(f"{path}:") for p in log.problems] == [
        "3: lists that do not align: weight_per_ingr: [100.0]",
        "4: fat that is no finite number >= 0: -1.0",
        "5: nrg that is no finite number >= 0: nan",
        "6: fat that is no number: None",
        f"7: an id that stands twice: {A}",
        "8: an unknown partition: None",
        "9: a weight that is no number: 'a'",
        "10: nutrients that are no object: 5",
        "11: no ingredients",
    ]
    assert [str(p).removeprefix(f"{path}:") for p in log.noted] == [
        "2: sums that miss the values per 100 g: energy 500, by the values per 100 g 1134"
    ]
    assert str(convert("recipe1m-plus", tmp_path, tmp_path / "o.jsonl")).endswith(
        "noted 1 x sums that miss the values per 100 g"
    )
    path.unlink()
    with pytest.raises(RecordError, match=r"^recipes with nutrition: none of .* exists"):
        read(tmp_path, "recipe1m-plus")
