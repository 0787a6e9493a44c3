from __future__ import annotations

import json
from pathlib import Path

import pytest

from published_layouts import write_lines, write_nutrition5k, write_picture
from rode_food.readers import guess_kind, read_source
from rode_food.readers.log import ReadLog
from rode_food.readers.nutrition5k_csv import misses
from rode_food.records import FoodRecord, Ingredient, Nutrition, RecordError

# id, name, grams, kcal, fat, carb, protein
BEEF = ("ingr_0000000008", "beef", 50.0, 125.0, 7.5, 0.0, 12.5)
RICE = ("ingr_0000000026", "White rice", 100.0, 130.0, 0.3, 28.0, 2.7)
SALT = ("ingr_0000000030", "salt", 1.0, 0.0, 0.0, 0.0, 0.0)
OIL = ("ingr_0000000031", "olive oil", 1.1, 9.7, 1.1, 0.0, 0.0)


def row(dish: str, *ingredients: tuple, count: bool = False, scale: float = 1.0) -> tuple:
    """A dish whose totals are `scale` times the sums of its ingredients."""
    mass, energy, fat, carb, protein = (
        scale * sum(float(i[column]) for i in ingredients) for column in range(2, 7)
    )
    number = (len(ingredients),) if count else ()
    return (dish, energy, mass, fat, carb, protein, *number, *(value for i in ingredients for value in i))


def read(folder: Path, **options: bool) -> tuple[list[FoodRecord], ReadLog]:
    log = ReadLog()
    return list(read_source("nutrition5k", folder, log, **options)), log


@pytest.mark.parametrize("count", ["1.0", "1", " 1 "])
@pytest.mark.parametrize("padding", [(), ("",) * 7, ("", " ") * 8])
def test_rows_as_a_spreadsheet_saves_them(tmp_path: Path, count: str, padding: tuple[str, ...]) -> None:
    beef = row("dish_1", BEEF, count=True)
    write_nutrition5k(
        tmp_path,
        [(*beef[:6], count, *beef[7:], *padding), row("dish_2", BEEF, RICE)],
        [(*row("dish_3", BEEF), *padding)],
        train=["dish_1", "dish_2"],
        test=["dish_3"],
        pictures=["dish_1", "dish_2", "dish_3"],
    )
    records, log = read(tmp_path)
    assert not log.counts
    assert [len(record.ingredients) for record in records] == [1, 2, 1]


def test_rows_with_and_without_a_number_of_ingredients(tmp_path: Path) -> None:
    write_nutrition5k(
        tmp_path,
        [row("dish_1", BEEF, RICE)],
        [row("dish_2", BEEF, count=True)],
        train=["dish_1"],
        test=["dish_2"],
        pictures=["dish_1", "dish_2"],
    )
    assert guess_kind(tmp_path) == "nutrition5k"
    (first, second), log = read(tmp_path)
    assert not log.counts
    assert not log.notes
    beef = Nutrition(mass=50.0, energy=125.0, fat=7.5, protein=12.5, carb=0.0)
    rice = Nutrition(mass=100.0, energy=130.0, fat=0.3, protein=2.7, carb=28.0)
    assert first == FoodRecord(
        id="dish_1",
        image=str(tmp_path / "imagery" / "realsense_overhead" / "dish_1" / "rgb.png"),
        source="nutrition5k",
        ingredients=(
            Ingredient("beef", 50.0, "g", 50.0, beef),
            Ingredient("white rice", 100.0, "g", 100.0, rice),
        ),
        nutrition=Nutrition(mass=150.0, energy=255.0, fat=7.8, protein=15.2, carb=28.0),
        split="train",
    )
    assert (second.split, second.ingredients) == ("test", (Ingredient("beef", 50.0, "g", 50.0, beef),))


def test_faults(tmp_path: Path) -> None:
    good = row("dish_1", BEEF)
    cafe1 = [
        good,
        (*row("dish_2", BEEF)[:4], "x", *row("dish_2", BEEF)[5:]),
        row("dish_3", BEEF)[:-1],
        ("dish_4", 1.0),
        row("dish_5", (*BEEF[:2], -1.0, *BEEF[3:])),
        (*row("dish_6", BEEF)[:6], 2, *BEEF),
        good,
        row("../dish_8", BEEF),
        row("dish_9", BEEF, scale=1.05),
        row("dish_10", BEEF, scale=1.01),
        row("dish_11", SALT, scale=0.0),
        row("dish_12", BEEF),
        row("dish_13", BEEF),
        (*row("dish_15", BEEF, SALT, scale=0.0)[:2], 51.0, *row("dish_15", BEEF, SALT, scale=0.0)[3:]),
        row("dish_14", BEEF, ("ingr_0000000002", "", *RICE[2:]), ("ingr_0000000999", "deprecated", *OIL[2:])),
    ]
    dishes = [f"dish_{n}" for n in range(1, 16) if n != 12]
    write_nutrition5k(
        tmp_path,
        cafe1,
        [],
        train=["dish_12", *dishes],
        test=[],
        ingredients=[("strawberries", 2, 0.33, 0.003, 0.08, 0.007)],
        pictures=dishes,
    )
    split = tmp_path / "dish_ids" / "splits" / "rgb_train_ids.txt"
    write_lines(split, [line for line in split.read_text().splitlines() if line != "dish_13"])
    records, log = read(tmp_path)
    assert [r.id for r in records] == ["dish_1", "dish_9", "dish_10", "dish_15", "dish_14"]
    assert records[-2].nutrition == Nutrition(mass=51.0, carb=0.0)  # beef has no carbohydrate, but energy
    # nameless here, but not in the table; "deprecated" is no name
    assert [i.name for i in records[-1].ingredients] == ["beef", "strawberries"]
    assert records[-1].nutrition is not None
    assert records[-1].nutrition.mass == pytest.approx(151.1)
    at = f"{tmp_path}/metadata/dish_metadata_cafe1.csv:"
    assert [str(p).removeprefix(at) for p in log.problems] == [
        "2: carb that is no number: 'x'",
        "3: a row of the wrong length: 12 columns",
        "4: a row of the wrong length: 2 columns",
        "5: mass that is no finite number >= 0: '-1.0'",
        "6: a wrong number of ingredients: '2', but there are 1",
        "7: an id that stands twice: dish_1",
        "8: a picture outside its folder: '../dish_8'",
        "11: no mass: dish_11",
        "12: no picture: dish_12",
        "13: no place in the official split: dish_13",
    ]
    assert [str(p).removeprefix(at) for p in log.noted] == [
        "9: totals that miss the sums of their ingredients: dish_9: mass 52.5, its ingredients' 50",
        "14: totals that miss the sums of their ingredients: dish_15: energy 0, its ingredients' 125",
        "15: a nameless or deprecated ingredient: dish_14",
    ]
    with pytest.raises(RecordError, match=r"dish_metadata_cafe1\.csv:2: carb that is no number"):
        list(read_source("nutrition5k", tmp_path, ReadLog(strict=True)))


def test_missing_files(tmp_path: Path) -> None:
    write_nutrition5k(tmp_path, [], [], train=["dish_1"], test=["dish_1"])
    with pytest.raises(RecordError, match=r"rgb_test_ids\.txt: dish_1 is in the training split already"):
        read(tmp_path)
    (tmp_path / "dish_ids" / "splits" / "rgb_test_ids.txt").unlink()
    with pytest.raises(RecordError, match=r"the official split: none of .*rgb_test_ids\.txt"):
        read(tmp_path)
    (tmp_path / "metadata" / "dish_metadata_cafe2.csv").unlink()
    with pytest.raises(RecordError, match=r"dishes: none of .*dish_metadata_cafe2\.csv"):
        read(tmp_path)


def test_foodlmm_selection(tmp_path: Path) -> None:
    """As utils/nutrition5k_dataset.py of FoodLMM selects, from its own cut of the data set."""
    many = [(f"ingr_{n:010d}", f"food {n}", float(n), 2.0 * n, 0.1, 0.1, 0.1) for n in range(2, 30)]
    rows = [
        row("dish_1", SALT, BEEF, OIL, RICE, (*BEEF[:3], 1.0, *BEEF[4:])),
        row("dish_2", SALT),
        row("dish_3", BEEF, ("ingr_0000000999", "Deprecated", *OIL[2:])),
        row("dish_4", *many),
        row("dish_5", BEEF),
        row("dish_6", BEEF),
    ]
    write_lines(tmp_path / "dish_metadata_cafe1.csv", [",".join(map(str, r)) for r in rows])
    write_lines(tmp_path / "dish_metadata_cafe2.csv", [])
    (tmp_path / "train_id.json").write_text(json.dumps([f"dish_{n}" for n in range(1, 6)]))
    (tmp_path / "test_id.json").write_text(json.dumps(["dish_6"]))
    for n in range(1, 5):
        write_picture(tmp_path / "images" / f"dish_{n}" / "rgb.png")
    for name in ("camera_A_frame_001", "camera_D_frame_002", "camera_D_frame_003", "camera_B_frame_009"):
        write_picture(tmp_path / "images" / "dish_5" / f"{name}.jpeg")
    records, log = read(tmp_path, foodlmm=True)
    assert [r.id for r in records] == ["dish_1", "dish_4", "dish_5"]
    # heaviest first; neither what weighs 1 g or less nor what has 1 kcal or less
    assert [i.name for i in records[0].ingredients] == ["white rice", "beef", "olive oil"]
    assert records[0].nutrition is not None
    assert records[0].nutrition.mass == pytest.approx(202.1)  # totals stay
    assert [i.name for i in records[1].ingredients] == [f"food {n}" for n in range(29, 9, -1)]
    assert Path(records[2].image).name == "camera_D_frame_002.jpeg"
    assert log.counts == {
        "no ingredient that FoodLMM names": 1,
        "a nameless or deprecated ingredient": 1,
        "no picture": 1,
    }
    records, log = read(tmp_path)
    assert [r.id for r in records] == ["dish_1", "dish_2", "dish_3", "dish_4"]
    assert log.counts == {"no picture": 2}
    (tmp_path / "test_id.json").write_text('{"dish_6": 1}')
    with pytest.raises(RecordError, match=r"test_id\.json: expected a list of dish ids, got \{'dish_6': 1\}"):
        read(tmp_path)


@pytest.mark.data
def test_all_real_rows_are_read_back(rode_data: Path, tmp_path: Path) -> None:
    """The 5,006 dishes, written as the original CSV rows, give the same numbers again."""
    dishes = [
        json.loads(line) for line in (rode_data / "nutrition5k" / "dishes.jsonl").read_text().splitlines()
    ]
    keys = ("mass_g", "kcal", "fat_g", "carb_g", "protein_g")
    rows: dict[str, list[tuple]] = {"cafe1": [], "cafe2": []}
    for number, dish in enumerate(dishes):
        parts = [value for i in dish["ingredients"] for value in (i["id"], i["name"], *(i[k] for k in keys))]
        totals = (dish[k] for k in ("kcal", "mass_g", "fat_g", "carb_g", "protein_g"))
        count = (len(dish["ingredients"]),) if number % 2 else ()
        rows[dish["cafe"]].append((dish["dish_id"], *totals, *count, *parts))
    ids = [dish["dish_id"] for dish in dishes]
    write_nutrition5k(tmp_path, rows["cafe1"], rows["cafe2"], train=ids[:4000], test=ids[4000:])
    picture = write_picture(tmp_path / "rgb.png")
    for dish in ids:
        folder = tmp_path / "imagery" / "realsense_overhead" / dish
        folder.mkdir(parents=True)
        (folder / "rgb.png").hardlink_to(picture)
    records, log = read(tmp_path)
    assert not log.counts
    found = {record.id: record for record in records}
    assert len(found) == len(dishes) == 5006
    for dish in dishes:
        record = found[dish["dish_id"]]
        total = record.nutrition
        assert total is not None
        # cafe 2 gives no total but mass
        assert (total.mass, total.energy, total.fat, total.carb, total.protein) == tuple(
            None if dish[key] == 0 and any(i[key] for i in dish["ingredients"]) else dish[key] for key in keys
        )
        wanted = [i for i in dish["ingredients"] if i["name"] != "deprecated"]
        assert [(i.name, i.mass) for i in record.ingredients] == [(i["name"], i["mass_g"]) for i in wanted]
        assert [i.nutrition and i.nutrition.energy for i in record.ingredients] == [i["kcal"] for i in wanted]
    by_energy = [
        dish
        for dish in dishes
        if abs(dish["kcal"] - sum(i["kcal"] for i in dish["ingredients"]))
        > 0.02 * max(dish["kcal"], sum(i["kcal"] for i in dish["ingredients"])) + 1e-6
    ]
    noted = log.notes["totals that miss the sums of their ingredients"]
    assert len(by_energy) == 238
    assert noted >= 238
    assert log.notes["a nameless or deprecated ingredient"] == sum(
        any(i["name"] == "deprecated" for i in dish["ingredients"]) for dish in dishes
    )
    assert misses(found[ids[0]]) == ""
