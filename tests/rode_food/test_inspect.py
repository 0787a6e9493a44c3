from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image

from published_layouts import (
    layer1,
    layer2,
    recipe_picture,
    write_array,
    write_bomb,
    write_picture,
    write_recipes,
)
from rode.cli import main
from rode.vlm import open_image
from rode_food.convert import convert
from rode_food.images import MAX_PIXELS, ImageError, decode_picture, wrong_suffix
from rode_food.inspect import inspect
from rode_food.readers import guess_kind
from rode_food.records import FoodRecord, Ingredient, Nutrition, read_records, write_records

NAMES = [f"{n}fa8309c13.jpg" for n in range(6)]


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    """Four sound recipes, whose pictures are: good, cut short, a GIF named .jpg, a bomb; one broken entry."""
    folder = tmp_path / "recipe1m"
    entries = [layer1(f"0{n}", partition=("train", "train", "val", "test")[n]) for n in range(4)]
    write_recipes(folder, [*entries, b"{oops}"], [layer2(f"0{n}", NAMES[n]) for n in range(4)], [])
    _, cut, gif, bomb = (recipe_picture(folder, name) for name in NAMES[:4])
    Image.effect_noise((64, 64), 60).save(cut)
    cut.write_bytes(cut.read_bytes()[:800])
    write_picture(gif, format="GIF")
    write_bomb(bomb, 8001)
    assert bomb.stat().st_size < 100_000
    return folder


def test_counts_samples_and_problems(recipes: Path) -> None:
    found = inspect(recipes, samples=2, images="all")
    assert (found.kind, found.records) == ("recipe1m", 4)
    assert found.splits == {"train": 2, "val": 1, "test": 1}
    assert found.fields["title"] == found.fields["ingredients"] == found.fields["ingredients.text"] == 4
    assert found.fields["ingredients.mass"] == found.fields["nutrition"] == 0
    assert found.ingredients == {2: 4}
    assert len(found.samples) == 2
    assert found.samples[0]["source"] == "recipe1m"
    assert (found.images, found.bad_images, found.wrong_suffixes) == (4, 2, 1)
    pictures = [recipes / "images" / Path(*name[:4]) / name for name in NAMES]
    assert [line.split(":")[0] for line in found.bad_image_list] == [
        f"image {pictures[1]} cannot be decoded",
        f"image {pictures[3]} cannot be decoded",
    ]
    assert "8001 x 8001 pixels, more than 64,000,000" in found.bad_image_list[1]
    assert found.wrong_suffix_list == [f"image {pictures[2]} is no JPEG"]
    assert found.broken == {"invalid JSON": 1}
    assert not found.left_out
    assert found.notes == {"a line that names no ingredient": 4}
    assert not found.sound
    text = str(found)
    assert f"{recipes}: recipe1m, 4 records" in text
    assert f"    {recipes}/layer1.json:5: invalid JSON: Expecting property name" in text
    assert "ingredients of a record: 2 to 2, median 2" in text


def test_implausible_numbers_and_lost_slashes_are_noted(tmp_path: Path) -> None:
    rows = [
        {
            "id": str(i),
            "image": None,
            "source": "s",
            "ingredients": [
                {
                    "name": "flour",
                    "mass": 1600 if i else 200,
                    "text": "14 cup flour" if i else "1/4 cup flour",
                }
            ],
            "nutrition": {"mass": 3000 if i else 300, "energy": 500},
        }
        for i in range(3)
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inspect(tmp_path / "r.jsonl", "records", samples=0)
    assert found.notes == {
        "a dish of more than 2,500 g": 2,
        "more than 1,500 g of one ingredient": 2,
        "a lost slash": 2,
    }
    assert (
        "  2 x more than 1,500 g of one ingredient\n    more than 1,500 g of one ingredient: record '1': 1,600 g of flour"
        in str(found)
    )


def test_a_sample_of_pictures(recipes: Path) -> None:
    assert inspect(recipes, images=0).images == 0
    found = inspect(recipes, images=2, samples=0)
    assert found.images == 2
    assert found.samples == []
    assert inspect(recipes, images=2).to_json() == inspect(recipes, images=2).to_json()
    drawn = {tuple(s["id"] for s in inspect(recipes, images=0, samples=1, seed=n).samples) for n in range(30)}
    assert drawn == {("00",), ("01",), ("02",), ("03",)}


def test_what_is_broken_is_left_out_by_convert_and_the_gif_is_used(recipes: Path, tmp_path: Path) -> None:
    done = convert("recipe1m", recipes, tmp_path / "o.jsonl", on_bad_image="skip")
    assert done.left_out == {"a missing or corrupt image": 2, "invalid JSON": 1}
    assert [r.id for r in read_records(tmp_path / "o.jsonl")] == ["00", "02"]
    with pytest.raises(ImageError, match=r"record '01': image .*1fa8309c13\.jpg cannot be decoded"):
        convert("recipe1m", recipes, tmp_path / "o.jsonl")


def test_the_command(recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "inspect", str(recipes), "--images", "all", "--json", str(tmp_path / "found.json")]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pictures decoded: 4; bad: 2; of another format than their name says: 1" in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["splits"] == {"train": 2, "val": 1, "test": 1}
    assert found["images"]["bad"] == 2
    assert found["problems"] == [
        {
            "reason": "invalid JSON",
            "file": f"{recipes}/layer1.json",
            "line": 5,
            "detail": "Expecting property name enclosed in double quotes",
        },
        *(
            {
                "reason": "a line that names no ingredient",
                "file": f"{recipes}/layer1.json",
                "line": line,
                "detail": "For the top:",
            }
            for line in (1, 2, 3, 4)
        ),
    ]
    assert main([*arguments, "--strict"]) == 1
    write_array(recipes / "layer1.json", [layer1("00")])
    assert main([*arguments, "--strict"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--derive-carb"]) == 1
    assert (
        "derive_carb: kind recipe1m does not take it; it takes images_per_recipe" in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        main(["data", "inspect", str(recipes), "--images", "few"])
    assert "expected a whole number or all, got 'few'" in capsys.readouterr().err


def test_convert_takes_options_of_the_kind(
    recipes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_array(recipes / "layer1.json", [layer1("00"), b"{oops}"])
    write_array(recipes / "layer2.json", [layer2("00", NAMES[0], NAMES[2])])
    out = tmp_path / "o.jsonl"
    arguments = ["data", "convert", "recipe1m", str(recipes), str(out)]
    assert main([*arguments, "--images-per-recipe", "3"]) == 0
    assert "wrote 2 records (2 train); left out 1 with invalid JSON" in capsys.readouterr().out
    assert main(arguments) == 0
    assert len(list(read_records(out))) == 1
    assert main([*arguments, "--strict"]) == 1
    assert f"{recipes}/layer1.json:2: invalid JSON" in capsys.readouterr().err
    assert main([*arguments, "--foodlmm"]) == 1
    assert "foodlmm: kind recipe1m does not take it" in capsys.readouterr().err


def test_records_as_a_source(tmp_path: Path) -> None:
    nutrition = Nutrition(mass=1.0, energy=2.0, fat=0.0, protein=0.0, carb=0.0)
    record = FoodRecord(
        id="a",
        image=str(write_picture(tmp_path / "a.jpg")),
        source="mine",
        category="soup",
        ingredients=(Ingredient("leek", mass=1.0, text="leek"),),
        nutrition=nutrition,
    )
    path = tmp_path / "r.jsonl"
    write_records(path, [record])
    assert guess_kind(path) == "records"
    found = inspect(path)
    assert (found.kind, found.records, found.splits, found.sound) == ("records", 1, {"none": 1}, True)
    assert found.categories == {"soup": 1}
    assert found.fields["all five of nutrition"] == 1
    assert convert("records", path, tmp_path / "below" / "o.jsonl", fractions={"val": 1.0}).written == {
        "val": 1
    }
    (again,) = read_records(tmp_path / "below" / "o.jsonl")
    assert again.image == record.image
    assert again.ingredients == record.ingredients
    line = path.read_bytes()
    spoiled = [
        line,
        b"{}\n",
        b"not JSON\n",
        b'{"id": "\xff"}\n',
        line.replace(b"leek", b"\\ud800"),
        b"\n",
        b"[" * 100_000,
    ]
    path.write_bytes(b"".join([*spoiled, b"\n", line.replace(b'"a"', b'"b"').replace(b"mine", b"all"), line]))
    found = inspect(path)
    assert found.records == 1
    assert [(p.line, p.reason) for p in found.problems] == [
        (2, "a record that breaks the schema"),
        (3, "invalid JSON"),
        (4, "invalid UTF-8"),
        (5, "invalid JSON"),
        (7, "invalid JSON"),
        (8, "a record that breaks the schema"),
        (9, "a record that breaks the schema"),
    ]


def test_nothing_is_recognised(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no layout that is known .*recipe1m: layer1\.json and .*--kind"
    ):
        inspect(tmp_path)
    with pytest.raises(ValueError, match="is neither a folder nor a file"):
        inspect(tmp_path / "absent")


def header_only_png(path: Path, width: int, height: int) -> Path:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))
    return path


def test_a_bomb_is_refused_by_its_header(tmp_path: Path) -> None:
    largest = write_picture(tmp_path / "largest.png", size=(8000, 8000))
    assert MAX_PIXELS == 8000 * 8000
    assert decode_picture(largest).format == "PNG"
    for side in (8001, 9000, 40_000):  # the last is past what Pillow itself refuses
        bomb = header_only_png(tmp_path / f"{side}.png", side, 8000)
        with pytest.raises(ImageError, match=rf"{bomb} cannot be decoded: .*(more than 64,000,000|bomb)"):
            decode_picture(bomb)
        with pytest.raises(OSError, match=rf"{bomb}: not a readable picture \(.*(more than 64,000,000|bomb)"):
            open_image(bomb)


def test_suffixes(tmp_path: Path) -> None:
    assert wrong_suffix("a.jpg", "GIF") == "JPEG"
    for name, image_format in (
        ("a.JPEG", "JPEG"),
        ("a.jpg", "MPO"),
        ("a", "GIF"),
        ("a.jpg!", "GIF"),
        ("a.png", "PNG"),
    ):
        assert wrong_suffix(name, image_format) is None


def test_a_sample_is_drawn_evenly() -> None:
    from rode_food.inspect import _draw

    draw = random.Random(0)
    counts = [0] * 10
    for _ in range(3000):
        chosen: list[int] = []
        for seen in range(1, 11):
            _draw(chosen, seen - 1, 3, seen, draw)
        for item in chosen:
            counts[item] += 1
    assert all(abs(count - 900) < 120 for count in counts), counts


@pytest.mark.data
def test_real_photographs(rode_data: Path) -> None:
    found = inspect(rode_data / "food_photos", images="all")
    assert (found.kind, found.records, found.images, found.sound) == ("food-photos", 201, 201, True)
    assert found.fields["ingredients.text"] == 201
    dishes = inspect(rode_data / "nutrition5k")
    assert (dishes.kind, dishes.records, dishes.left_out) == ("nutrition5k-jsonl", 4, {"no picture": 5002})
