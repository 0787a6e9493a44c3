"""Small made-up data sets in the layouts in which publishers ship theirs. All words and numbers are made up.

Recipe1M itself, of any size, is written by `benchmarks.made_up_recipe1m.write_recipe1m`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

Row = Sequence[Any]


def write_picture(
    path: Path, shade: int = 0, size: tuple[int, int] = (16, 16), format: str | None = None
) -> Path:
    """A plain picture; `format` overrides what the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 80, 160)).save(path, format)
    return path


def write_bomb(path: Path, side: int = 12_000) -> Path:
    """A PNG of `side` x `side` black pixels: some hundred kilobytes on disk, side * side * 3 bytes in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", (side, side)).save(path, "PNG")
    return path


def write_array(path: Path, entries: Sequence[Any]) -> Path:
    """A JSON array, an entry a line from line 1 on; bytes are written as they are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = (entry if isinstance(entry, bytes) else json.dumps(entry).encode() for entry in entries)
    path.write_bytes(b"[" + b",\n".join(parts) + b"]")
    return path


def layer1(identifier: str, **changes: Any) -> dict[str, Any]:
    """An entry of layer1.json."""
    return {
        "id": identifier,
        "title": f"Dish {identifier}",
        "url": "http://www.example.com",
        "partition": "train",
        "ingredients": [
            {"text": "2 cups flour, sifted"},
            {"text": "For the top:"},
            {"text": "Salt to taste"},
        ],
        "instructions": [{"text": "Mix it."}, {"text": " "}, {"text": "Bake  it."}],
        **changes,
    }


def layer2(identifier: str, *pictures: str) -> dict[str, Any]:
    return {"id": identifier, "images": [{"id": name, "url": "http://www.example.com"} for name in pictures]}


def det_ingrs(identifier: str, **names: bool) -> dict[str, Any]:
    """`all_purpose_flour=True`: a valid name; `_` stands for a space."""
    texts = [{"text": name.replace("_", " ")} for name in names]
    return {"id": identifier, "valid": list(names.values()), "ingredients": texts}


def recipe_picture(folder: Path, name: str, below: str = "images") -> Path:
    return write_picture(Path(folder, below, *name[:4], name), shade=len(name))


def write_recipes(
    folder: Path, layer1: Sequence[Any], layer2: Sequence[Any], det_ingrs: Sequence[Any] | None = None
) -> Path:
    """Recipe1M's files without its pictures."""
    write_array(folder / "layer1.json", layer1)
    write_array(folder / "layer2.json", layer2)
    if det_ingrs is not None:
        write_array(folder / "det_ingrs.json", det_ingrs)
    return folder


def with_nutrition(identifier: str, **changes: Any) -> dict[str, Any]:
    """An entry of recipes_with_nutritional_info.json: 100 g of oat flakes and a tablespoon of oil."""
    parts = [
        {"nrg": 380.0, "fat": 7.0, "pro": 13.0, "sat": 1.2, "sug": 1.0, "sod": 6.0},
        {"nrg": 120.0, "fat": 13.5, "pro": 0.0, "sat": 1.9, "sug": 0.0, "sod": 0.0},
    ]
    weights = [100.0, 13.5]
    total = {key: sum(part[key] for part in parts) / sum(weights) * 100 for key in parts[0]}
    return {
        "id": identifier,
        "title": "Oats",
        "url": "http://www.example.com",
        "partition": "test",
        "ingredients": [{"text": "oats, rolled"}, {"text": "oil, sesame"}],
        "quantity": [{"text": "100"}, {"text": "1 1/2"}],
        "unit": [{"text": "g"}, {"text": "tablespoons"}],
        "weight_per_ingr": weights,
        "instructions": [{"text": "Roast."}],
        "nutr_per_ingredient": parts,
        "nutr_values_per100g": {
            "energy": total["nrg"],
            "fat": total["fat"],
            "protein": total["pro"],
            "saturates": total["sat"],
            "sugars": total["sug"],
            "salt": total["sod"] * 2.5 / 1000,
        },
        "fsa_lights_per100g": {"fat": "red", "salt": "green", "saturates": "orange", "sugars": "green"},
        **changes,
    }


def write_nutrition5k(
    folder: Path,
    cafe1: Sequence[Row],
    cafe2: Sequence[Row],
    *,
    train: Sequence[str],
    test: Sequence[str],
    ingredients: Sequence[Row] = (),
    pictures: Sequence[str] = (),
) -> Path:
    """The CSV files, the split, and an overhead picture of each dish in `pictures`."""
    rows = {
        "metadata/dish_metadata_cafe1.csv": cafe1,
        "metadata/dish_metadata_cafe2.csv": cafe2,
        "metadata/ingredients_metadata.csv": [
            ("ingr", "id", "cal/g", "fat(g)", "carb(g)", "protein(g)"),
            *ingredients,
        ],
        "dish_ids/splits/rgb_train_ids.txt": [(dish,) for dish in train],
        "dish_ids/splits/rgb_test_ids.txt": [(dish,) for dish in test],
    }
    for name, values in rows.items():
        write_lines(folder / name, [",".join(map(str, row)) for row in values])
    for number, dish in enumerate(pictures):
        write_picture(folder / "imagery" / "realsense_overhead" / dish / "rgb.png", number)
    return folder


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_food101(folder: Path, train: Sequence[str], test: Sequence[str], *, as_json: bool = False) -> Path:
    """`train` and `test` name pictures: "apple_pie/1"."""
    classes = sorted({name.split("/")[0] for name in (*train, *test)})
    write_lines(folder / "meta" / "classes.txt", classes)
    write_lines(folder / "meta" / "labels.txt", [name.replace("_", " ").capitalize() for name in classes])
    for split, names in (("train", train), ("test", test)):
        if as_json:
            grouped = {c: [name for name in names if name.startswith(f"{c}/")] for c in classes}
            write_lines(folder / "meta" / f"{split}.json", [json.dumps(grouped)])
        else:
            write_lines(folder / "meta" / f"{split}.txt", names)
        for name in names:
            write_picture(folder / "images" / f"{name}.jpg")
    return folder


def write_food2k(folder: Path, names: Sequence[str], **splits: Sequence[str]) -> Path:
    """`train=["0/a.jpg"]`: pictures by class number; `names` of the classes."""
    write_lines(folder / "food2k_label2name_en.txt", [f"{n:04d}--{name}" for n, name in enumerate(names)])
    for split, pictures in splits.items():
        write_lines(folder / f"{split}_finetune.txt", [f"{p} {p.split('/')[0]}" for p in pictures])
        for picture in pictures:
            write_picture(folder / picture)
    return folder


def write_vireo(
    folder: Path,
    classes: Sequence[str],
    vocabulary: Sequence[str],
    labels: Mapping[str, Sequence[int]],
    *,
    images: str = "ready_chinese_food",
    lists: str = "SplitAndIngreLabel",
    **splits: Sequence[str],
) -> Path:
    """`labels`: picture ("/1/a.jpg") -> 1 or -1 for each ingredient; `TR=[...]`, `VAL`, `TE`: its pictures."""
    write_lines(folder / lists / "FoodList.txt", classes)
    write_lines(folder / lists / "IngredientList.txt", vocabulary)
    rows = [f"{picture} {' '.join(map(str, values))}" for picture, values in labels.items()]
    write_lines(folder / lists / "IngreLabel.txt", rows)
    for split, pictures in splits.items():
        write_lines(folder / lists / f"{split}.txt", pictures)
        for picture in pictures:
            write_picture(Path(f"{folder}/{images}{picture}"))
    return folder
