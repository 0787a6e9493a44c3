"""Recipe1M+'s recipes with nutrition (Marin et al., 2019): `recipes_with_nutritional_info.json`, 51,235 of Recipe1M's.

    [{id, title, url, partition, ingredients: [{text}], instructions: [{text}], quantity: [{text}], unit: [{text}],
      weight_per_ingr: [g], nutr_per_ingredient: [{nrg, fat, pro, sat, sug, sod}], nutr_values_per100g: {energy, fat, protein,
      saturates, sugars, salt}, fsa_lights_per100g: {...}}]

Units, by the README of github.com/torralba-lab/im2recipe-Pytorch: weights, fat, protein, saturates, sugars and salt in
grams, nrg and energy in kcal, sod in mg; salt = sodium * 2.5 / 1000. `ingredients` are not the recipe's words but the USDA
foods that these were matched to. The values of an ingredient are of all of it: their sum over the recipe is
nutr_values_per100g * sum(weight_per_ingr) / 100. There is no carbohydrate. Pictures come from layer2+.json or layer2.json,
as in `rode_food.readers.recipe1m`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rode_food.lines.simple import normalise_unit, parse_amount
from rode_food.readers.common import (
    Broken,
    first_existing,
    number_of,
    shown,
    split_of,
    text_of,
    texts_of,
    unique,
)
from rode_food.readers.json_array import read_json_array
from rode_food.readers.log import ReadLog
from rode_food.readers.recipe1m import FOLDERS, Pictures
from rode_food.records import SPLITS, FoodRecord, Ingredient, Nutrition, Quantity

FILE = "recipes_with_nutritional_info.json"
TOLERANCE = 0.02
"""By which a recipe's sums may miss its values per 100 g, relative, before that is noted."""
_ENERGY = {"fat": 9.0, "protein": 4.0, "carb": 4.0}  # kcal a gram, Atwater's general factors
_PER_100G = {
    "energy": "energy",
    "fat": "fat",
    "protein": "protein",
    "saturated fat": "saturates",
    "sugars": "sugars",
}
_MICRO = {"saturated fat": ("sat", "g"), "sugars": ("sug", "g"), "sodium": ("sod", "mg")}


def read(
    source: Path, log: ReadLog, *, images_per_recipe: int = 1, derive_carb: bool = False
) -> Iterator[FoodRecord]:
    """One record for each recipe and each of its first `images_per_recipe` pictures that exist.

    An ingredient's `name` is the USDA food; `amount` and `unit` are the recipe's, `mass` its weight. Saturated fat, sugars
    (g) and sodium (mg) are micronutrients. The dish's nutrition is the sum over its ingredients. A recipe whose sums miss
    `nutr_values_per100g` by more than 2 % is kept and noted.

    Args:
        derive_carb: carbohydrate = (energy - 9 fat - 4 protein) / 4 where that is not negative, for each ingredient and,
            from its own sums, for the dish. It takes fibre and alcohol for carbohydrate. Else carbohydrate is unknown.

    Raises:
        RecordError: the file or layer2 is missing or no JSON array; a broken entry, if `log.strict`.
    """
    path = first_existing((source / folder / FILE for folder in FOLDERS), "recipes with nutrition")
    pictures = Pictures(source, log)
    try:
        entries = read_json_array(path, log, keys=("id", "ingredients", "nutr_per_ingredient"))
        for entry in unique(entries, path, log):
            try:
                record = _record(entry.value, derive_carb)
                if not record.ingredients:
                    log.leave_out("no ingredients", file=path, line=entry.line)
                    continue
                odd = _misses(record, entry.value.get("nutr_values_per100g"))
            except Broken as error:
                log.leave_out_broken(error.reason, file=path, line=entry.line, detail=error.detail)
                continue
            if odd:
                log.note("sums that miss the values per 100 g", file=path, line=entry.line, detail=odd)
            yield from pictures.records(record, images_per_recipe, path, entry.line)
    finally:
        pictures.close()


def _record(entry: dict[str, Any], derive_carb: bool) -> FoodRecord:
    columns: dict[str, Any] = {
        key: entry.get(key)
        for key in ("ingredients", "quantity", "unit", "weight_per_ingr", "nutr_per_ingredient")
    }
    for key, column in columns.items():
        if not isinstance(column, list) or len(column) != len(columns["ingredients"] or ()):
            raise Broken("lists that do not align", f"{key}: {shown(column)}")
    names = texts_of(columns["ingredients"], "ingredients")
    quantities, units = texts_of(columns["quantity"], "quantities"), texts_of(columns["unit"], "units")
    ingredients, parts = [], []
    for name, quantity, unit, weight, values in zip(
        names, quantities, units, columns["weight_per_ingr"], columns["nutr_per_ingredient"], strict=True
    ):
        if name is None:
            raise Broken("an ingredient without a name")
        part = _nutrition(weight, values, derive_carb)
        amount = parse_amount(quantity or "")
        ingredients.append(
            Ingredient(
                name,
                amount=amount if amount is None or math.isfinite(amount) else None,
                unit=normalise_unit(unit or ""),
                mass=part.mass,
                nutrition=part,
            )
        )
        parts.append(part)
    return FoodRecord(
        id=entry["id"],
        image="",
        source="recipe1m-plus",
        split=split_of(entry.get("partition"), {name: name for name in SPLITS}),
        title=None if entry.get("title") is None else text_of(entry["title"], "a title"),
        ingredients=tuple(ingredients),
        instructions=tuple(filter(None, texts_of(entry.get("instructions"), "instructions"))),
        nutrition=_sum(parts, derive_carb),
    )


def _nutrition(weight: object, values: object, derive_carb: bool) -> Nutrition:
    if not isinstance(values, dict):
        raise Broken("nutrients that are no object", shown(values))
    energy, fat, protein = (number_of(values.get(key), key) for key in ("nrg", "fat", "pro"))
    return Nutrition(
        mass=number_of(weight, "a weight"),
        energy=energy,
        fat=fat,
        protein=protein,
        carb=_carb(energy, fat, protein) if derive_carb else None,
        micronutrients={
            name: Quantity(number_of(values.get(key), key), unit) for name, (key, unit) in _MICRO.items()
        },
    )


def _carb(energy: float, fat: float, protein: float) -> float | None:
    carb = (energy - _ENERGY["fat"] * fat - _ENERGY["protein"] * protein) / _ENERGY["carb"]
    return carb if carb >= 0 else None


def _sum(parts: list[Nutrition], derive_carb: bool) -> Nutrition:
    energy, fat, protein = (
        math.fsum(getattr(p, name) for p in parts) for name in ("energy", "fat", "protein")
    )
    return Nutrition(
        mass=math.fsum(p.mass or 0.0 for p in parts),
        energy=energy,
        fat=fat,
        protein=protein,
        # not the sum of the ingredients': oil gives a little less than 9 kcal a gram, and so has no carbohydrate
        # of its own, but the dish has
        carb=_carb(energy, fat, protein) if derive_carb else None,
        micronutrients={
            name: Quantity(math.fsum(p.micronutrients[name].value for p in parts), unit)
            for name, (_, unit) in _MICRO.items()
        },
    )


def _misses(record: FoodRecord, per_100g: object) -> str:
    """The sums of the recipe that miss its values per 100 g; "" if all agree or there are none to compare with."""
    if not isinstance(per_100g, dict) or record.nutrition is None:
        return ""
    total = record.nutrition
    for name, key in _PER_100G.items():
        if key not in per_100g:
            continue
        want = number_of(per_100g[key], key) * (total.mass or 0.0) / 100.0
        got = total.micronutrients[name].value if name in total.micronutrients else getattr(total, name)
        if abs(got - want) > TOLERANCE * max(got, want) + 1e-6:
            return f"{name} {got:.4g}, by the values per 100 g {want:.4g}"
    return ""
