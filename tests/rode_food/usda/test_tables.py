from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from rode_food.usda import Food, Portion, UsdaError, load_foods
from rode_food.usda.names import common_foods
from tiny_usda import tiny_table, write_sr28_csv

BUTTER = Food(
    "01001", "Butter, salted", "Dairy and Egg Products", 717.0, 81.11, 0.85, 0.06,
    (Portion(1.0, "pat", 5.0), Portion(1.0, "tbsp", 14.2)),
)  # fmt: skip


def test_csv_gives_foods_and_portions_in_order(tmp_path):
    write_sr28_csv(tmp_path)
    table = load_foods(tmp_path)
    assert {food.id: food for food in table} == {food.id: food for food in tiny_table()}
    assert table["00003"].portions == (Portion(1.0, "tsp", 2.8), Portion(3.0, "cloves", 9.0))


def write_ascii(folder: Path, nut_data: str | None = None) -> None:
    (folder / "FD_GROUP.txt").write_text("~0100~^~Dairy and Egg Products~\r\n")
    # a description with a letter of ISO 8859-1, and a food that lacks its nutrients
    (folder / "FOOD_DES.txt").write_bytes(
        b"~01001~^~0100~^~Butter, salted~^~BUTTER~^~~^~~^~Y~^~~^0^~~^6.38^4.27^8.79^3.87\r\n"
        b"~01002~^~0100~^~Cr\xe8me~^~CREME~^~~^~~^~~^~~^0^~~^^^^\r\n"
    )
    (folder / "NUT_DATA.txt").write_text(
        nut_data
        or "~01001~^~203~^0.85^16^0.074^~1~\r\n~01001~^~204~^81.11^580^0.065\r\n"
        "~01001~^~205~^0.06^0^\r\n~01001~^~208~^717^0^\r\n~01001~^~268~^2999^0^\r\n~01002~^~208~^300^0^\r\n"
    )
    (folder / "WEIGHT.txt").write_text("~01001~^~2 ~^1^~tbsp~^14.2^^\r\n~01001~^~1 ~^1^~pat~^5^^\r\n")


def test_ascii(tmp_path):
    write_ascii(tmp_path)
    table = load_foods(tmp_path)
    assert list(table) == [Food(**{**BUTTER.__dict__, "portions": BUTTER.portions[::-1]})]
    assert table.incomplete == 1


def write_fdc(folder: Path) -> None:
    def write(name: str, head: str, *rows: str) -> None:
        (folder / name).write_text("\n".join([head, *rows]) + "\n")

    write(
        "food.csv",
        '"fdc_id","data_type","description","food_category_id","publication_date"',
        '"173410","sr_legacy_food","Butter, salted","1","2019-04-01"',
        '"789828","foundation_food","Butter, stick, salted","1","2020-10-30"',
        '"5","branded_food","BUTTER","",""',
        '"11","foundation_food","Ghee, old","1","2020"',
        '"12","foundation_food","Ghee, new","1","2021"',
        '"13","foundation_food","Ham, unnumbered","10","2021"',
    )
    write("food_category.csv", "id,code,description", '"1","0100","Dairy and Egg Products"')
    write("sr_legacy_food.csv", "fdc_id,NDB_number", '"173410","1001"')
    write(
        "foundation_food.csv",
        "fdc_id,NDB_number,footnote",
        '"789828","1001",""',
        '"11","99",""',
        '"12","99",""',
    )
    rows = []
    for fdc_id, values in {
        "173410": {"1003": 0.85, "1004": 81.11, "1005": 0.06, "1008": 717, "1062": 3000},
        "789828": {"1003": 1, "1004": 80, "1005": 1, "1008": 700},
        "5": {"1003": 9, "1004": 9, "1005": 9, "1008": 9},
        "11": {"1003": 1, "1004": 1, "1005": 1, "1008": 1},
        "12": {"1003": 2, "1004": 99, "1005": -0.3, "2047": 876, "2048": 880},
        "13": {"1003": 20, "1004": 5, "1005": 1, "2047": 130},
    }.items():
        rows += [f'"{len(rows)}","{fdc_id}","{nutrient}","{value}"' for nutrient, value in values.items()]
    write("food_nutrient.csv", "id,fdc_id,nutrient_id,amount", *rows)
    write("measure_unit.csv", "id,name", '"1000","cup"', '"9999","undetermined"')
    write(
        "food_portion.csv",
        "id,fdc_id,seq_num,amount,measure_unit_id,portion_description,modifier,gram_weight",
        '"1","173410","2","1.0","9999","","tbsp","14.2"',
        '"2","173410","1","1.0","9999","","pat","5"',
        '"3","12","","1","1000","","melted","205"',
        '"4","13","1","","1000","","diced",""',
    )


def test_fooddata_central_prefers_sr_legacy_and_the_latest_version(tmp_path):
    write_fdc(tmp_path)
    table = load_foods(tmp_path)
    assert table["01001"] == BUTTER
    assert sorted(food.id for food in table) == ["00099", "01001", "fdc:13"]
    ghee = table["00099"]
    # energy by specific Atwater factors before general ones; carbohydrate by difference never below 0
    assert (ghee.description, ghee.energy, ghee.carb) == ("Ghee, new", 880.0, 0.0)
    assert ghee.portions == (Portion(1.0, "cup, melted", 205.0),)
    assert table["fdc:13"].energy == 130.0
    assert table["fdc:13"].group == "10"  # no such row in food_category.csv


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: None, r"has neither food.csv, FOOD_DES.txt nor sr28_foods.csv; download USDA's SR Legacy"),
        (
            lambda f: (f / "FOOD_DES.txt").write_text(""),
            r"has FOOD_DES.txt but not FD_GROUP.txt, NUT_DATA.txt",
        ),
        (lambda f: write_ascii(f, "~01001~^~203~\r\n"), r"NUT_DATA.txt:1: expected 3 fields or more, got 2"),
        (
            lambda f: write_ascii(f, "~01001~^~203~^-4^1\r\n"),
            r"NUT_DATA.txt:1: expected a number >= 0, got '-4'",
        ),
        (
            lambda f: write_ascii(f, "~01001~^~203~^x^1\r\n"),
            r"NUT_DATA.txt:1: expected a number >= 0, got 'x'",
        ),
        (
            lambda f: write_ascii(f, "~01001~^~203~^4^1\r\n"),
            r"holds no food with energy, fat, protein and carb",
        ),
    ],
)
def test_what_is_missing_or_broken_is_named(tmp_path, spoil, message):
    spoil(tmp_path)
    with pytest.raises(UsdaError, match=message):
        load_foods(tmp_path)


def spoil_csv(folder: Path, name: str, old: str, new: str) -> None:
    path = folder / name
    text = path.read_bytes()
    assert old.encode() in text
    path.write_bytes(text.replace(old.encode(), new.encode("latin-1"), 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("350", "nan", r"sr28_foods.csv:2: expected a number >= 0, got 'nan'"),
        ("kcal", "calories", r"sr28_foods.csv:1: no column kcal"),
        ("Flour", "Fl\xf6ur", r"sr28_foods.csv: not UTF-8"),
        (",75\r\n", "\r\n", r"sr28_foods.csv:2: cut short"),
    ],
)
def test_broken_csv(tmp_path, old, new, message):
    write_sr28_csv(tmp_path)
    spoil_csv(tmp_path, "sr28_foods.csv", old, new)
    with pytest.raises(UsdaError, match=message):
        load_foods(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(UsdaError, match=r"nowhere is not a folder; download"):
        load_foods(tmp_path / "nowhere")


@pytest.mark.data
def test_sr28(rode_data):
    table = load_foods(rode_data / "usda")
    assert len(table) == 8789
    assert table.incomplete == 0
    flour = table["20081"]
    assert (flour.energy, flour.fat, flour.protein, flour.carb) == (364.0, 0.98, 10.33, 76.31)
    assert flour.portions == (Portion(1.0, "cup", 125.0),)


@pytest.mark.data
def test_every_common_food_is_what_its_row_expects(rode_data):
    table = load_foods(rode_data / "usda")
    for row in common_foods().values():
        assert row.expect, row.name
        for id in (row.ndb_no, row.served):
            assert id in table, f"{row.name}: {id}"
            description = table[id].description.lower()
            missing = [word for word in row.expect.lower().split() if word not in description]
            assert not missing, f"{row.name}: {id} is {table[id].description!r}"


def test_the_map_says_one_thing_of_a_name():
    from importlib import resources

    from rode_food.usda.names import normalise

    seen: dict[str, tuple[str, str]] = {}
    with (resources.files("rode_food.usda") / "common_foods.csv").open(encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            name, foods = normalise(row["name"]), (row["ndb_no"], row["served_ndb_no"])
            assert seen.setdefault(name, foods) == foods, row["name"]
            assert re.fullmatch(r"\d{5}", row["ndb_no"]), row
            assert re.fullmatch(r"(\d{5})?", row["served_ndb_no"]), row
    assert len({ids[0] for ids in seen.values()}) >= 200
