"""What the vision server answers: plausible nutrition, and the faults it can be told to have."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Nutrition = Mapping[str, float]
"""energy (kcal), fat, protein, carb (g) of a mass of food; `micronutrients` may be (name, value, unit) triples."""


def plain_food(name: str, mass: float) -> Nutrition:
    """Something that passes every check and differs from food to food."""
    kind = sum(name.encode()) % 7
    fat, protein, carb = (mass * share / 100 for share in (2 + kind, 5 + kind, 30 - kind))
    return {"energy": 9 * fat + 4 * protein + 4 * carb, "fat": fat, "protein": protein, "carb": carb}


def foods_of(table: Path) -> Callable[[str, float], Nutrition]:
    """From a CSV of foods per 100 g (description, kcal, fat_g, protein_g, carb_g): the shortest that has the name's words."""
    with table.open(encoding="utf-8") as lines:
        rows = [
            row
            for row in csv.DictReader(lines)
            if all(row[k] for k in ("kcal", "fat_g", "protein_g", "carb_g"))
        ]
    words = [set(re.findall(r"[a-z]+", row["description"].lower())) for row in rows]

    def nutrition(name: str, mass: float) -> Nutrition:
        wanted = {word.rstrip("s") for word in re.findall(r"[a-z]+", name.lower())}
        hits = [len(wanted & {word.rstrip("s") for word in known}) for known in words]
        best = min(range(len(rows)), key=lambda i: (-hits[i], len(words[i]), i))
        if not hits[best]:
            return plain_food(name, mass)
        row = rows[best]
        keys = {"energy": "kcal", "fat": "fat_g", "protein": "protein_g", "carb": "carb_g"}
        return {field: float(row[key]) * mass / 100 for field, key in keys.items()}

    return nutrition


def error_object(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    return {"message": message, "type": kind, "code": code, "param": param}


FAULTS: dict[str, tuple[int, dict[str, Any]]] = {
    "400": (400, error_object("Something is not right", "BadRequestError")),
    "400 image": (400, error_object("Invalid image.", "invalid_request_error", "image_parse_error")),
    "400 words": (400, error_object("Failed to load image or audio file", "invalid_request_error")),
    "400 parameter": (
        400,
        error_object("Unsupported parameter: 'max_tokens'", "invalid_request_error", "unsupported_parameter"),
    ),
    "400 blind": (400, error_object("llava-text is not a multimodal model", "BadRequestError")),
    "401": (401, error_object("Incorrect API key provided", "invalid_request_error", "invalid_api_key")),
    "403": (403, error_object("Country not supported", "request_forbidden")),
    "404": (404, error_object("The model `none` does not exist", "invalid_request_error", "model_not_found")),
    "429": (429, error_object("Rate limit reached", "requests", "rate_limit_exceeded")),
    "429 after": (429, error_object("Rate limit reached", "tokens", "rate_limit_exceeded")),
    "429 quota": (
        429,
        error_object("You exceeded your current quota", "insufficient_quota", "insufficient_quota"),
    ),
    "500": (500, error_object("The server had an error", "server_error")),
    "503": (503, error_object("Overloaded", "server_error")),
}
"""Status and error object. The server also knows "hang", "cut", "drop" (no byte of an answer), "html", "error in 200", "no
usage", in batches "no line", and what `spoil` does."""


def spoil(
    fault: str | None, entries: list[dict[str, Any]], message: dict[str, Any]
) -> tuple[str, str | None]:
    """finish_reason and content of an answer with the fault in it."""
    first = entries[0]
    if fault == "missing":
        entries.pop()
    elif fault == "duplicate":
        entries.append(dict(first))
    elif fault == "unknown":
        entries.append(first | {"number": 99})
    elif fault == "kilojoules":
        for entry in entries:
            entry["energy_kcal"] = round(entry["energy_kcal"] * 4.184, 4)
    elif fault == "negative":
        first["mass_g"] = -first["mass_g"]
    elif fault == "text for a number":
        first["mass_g"] = "about 60"
    elif fault == "heavy":
        first["mass_g"] *= 100
    elif fault == "NaN":
        first["fat_g"] = float("nan")
    content = json.dumps({"ingredients": entries})
    if fault == "truncated":
        return "length", content[: len(content) // 2]
    if fault == "half":
        return "stop", content[: len(content) // 2]
    if fault == "prose":
        return "stop", "Certainly! The dish has about 400 kcal."
    if fault == "fenced":
        return "stop", f"```json\n{content}\n```"
    if fault == "refusal":
        message["refusal"] = "I'm sorry, I can't help with that."
        return "stop", None
    if fault == "content filter":
        return "content_filter", None
    if fault == "empty":
        return "stop", None
    return "stop", content
