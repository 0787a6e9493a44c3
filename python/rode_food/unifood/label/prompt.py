"""The question that is asked: the picture and the ingredients with their amounts, not the recipe (as in the paper)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

from rode_food.images import open_image
from rode_food.records import Ingredient
from rode_food.unifood.label.settings import LabelSettings

PROMPT_VERSION = "1"
"""Part of the ledger's key: raise it with every change of wording or schema, and all is asked anew."""

NUMBERS = {
    "mass": "mass_g",
    "energy": "energy_kcal",
    "fat": "fat_g",
    "protein": "protein_g",
    "carb": "carbohydrate_g",
}
"""Field of `Nutrition` -> its name in the answer, which states the unit."""
MICRONUTRIENT_UNITS = ("g", "mg", "ug", "IU")

_SYSTEM = """\
You estimate nutrition for a food composition data set. You get a photograph of a finished dish and the numbered list of \
its ingredients, with the amounts that went into the whole dish. For every ingredient give, for its whole amount in the \
dish and not for 100 g:
- mass_g: grams, without what is thrown away;
- energy_kcal: kilocalories (kcal), not kilojoules;
- fat_g, protein_g, carbohydrate_g: grams; carbohydrate includes fibre.
"""
_MICRONUTRIENTS = """\
- micronutrients: name, value and unit (g, mg, ug or IU) of fibre and of those vitamins and minerals of which the \
ingredient is a notable source; an empty list where you do not know.
"""
_RULES = """\
Where a line states no amount, judge it from the photograph and the other ingredients. Answer for every number of the \
list exactly once, also for water and salt. Give your best estimate; do not refuse for want of certainty."""
_FORM = """
Answer with one JSON object and nothing else, of this form, all values plain numbers:
"""
_LONGEST_QUOTE = 4000
"""Characters of a failed answer that are sent back; one without an end would cost more than it tells."""


def ingredient_line(ingredient: Ingredient) -> str:
    """The recipe's own line, or one made of amount, unit and name; on one line in any case."""
    if ingredient.text:
        return " ".join(ingredient.text.split())
    amount = None if ingredient.amount is None else f"{ingredient.amount:g}"
    return " ".join(filter(None, (amount, ingredient.unit, *ingredient.name.split())))


def schema(settings: LabelSettings) -> dict[str, Any]:
    """JSON schema of an answer, within what OpenAI's strict mode takes: every field required, none besides."""

    def strict(properties: dict[str, Any]) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    entry: dict[str, Any] = {"number": {"type": "integer"}}
    entry |= {name: {"type": "number"} for name in NUMBERS.values()}
    if settings.micronutrients:
        quantity = {
            "name": {"type": "string"},
            "value": {"type": "number"},
            "unit": {"type": "string", "enum": list(MICRONUTRIENT_UNITS)},
        }
        entry["micronutrients"] = {"type": "array", "items": strict(quantity)}
    return strict({"ingredients": {"type": "array", "items": strict(entry)}})


def _system(settings: LabelSettings) -> str:
    text = _SYSTEM + (_MICRONUTRIENTS if settings.micronutrients else "") + _RULES
    if settings.structured == "json_schema":
        return text
    entry: dict[str, Any] = {"number": 1} | dict.fromkeys(NUMBERS.values(), 0.0)
    if settings.micronutrients:
        entry["micronutrients"] = [{"name": "sodium", "value": 0.0, "unit": "mg"}]
    return text + _FORM + json.dumps({"ingredients": [entry]})


def question(lines: Sequence[str]) -> str:
    return "Ingredients:\n" + "\n".join(f"{number}. {line}" for number, line in enumerate(lines, start=1))


def follow_up(problems: Sequence[str]) -> str:
    listed = "\n".join(f"- {problem}" for problem in problems)
    return f"That answer cannot be used:\n{listed}\nAnswer again in full, for every ingredient of the list."


def text_of(lines: Sequence[str], failed: tuple[str, Sequence[str]] | None, settings: LabelSettings) -> str:
    """All text of a request, to count tokens by; the schema is part of what OpenAI counts."""
    parts = [_system(settings), question(lines)]
    if settings.structured == "json_schema":
        parts.append(json.dumps(schema(settings)))
    if failed is not None:
        parts += [failed[0][:_LONGEST_QUOTE], follow_up(failed[1])]
    return "\n".join(parts)


def resized(width: int, height: int, side: int) -> tuple[int, int]:
    """Width and height in pixels once the longest side is at most `side`; never larger than it was."""
    scale = min(1.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def encode_picture(path: str, side: int) -> str:
    """The picture, upright, as a JPEG in a `data:` URL. Raises OSError as `open_image` does."""
    image = open_image(path)
    size = resized(*image.size, side)
    if size != image.size:
        from PIL import Image

        image = image.resize(size, Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")


def request_body(
    picture: str,
    lines: Sequence[str],
    settings: LabelSettings,
    failed: tuple[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The body of a chat completion.

    Args:
        picture: a `data:` URL.
        lines: the ingredients', in order.
        settings: of the stage.
        failed: an answer that could not be used and what was wrong with it, for asking again.
    """
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": _system(settings)},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": question(lines)},
                {"type": "image_url", "image_url": {"url": picture, "detail": settings.image_detail}},
            ],
        },
    ]
    if failed is not None:
        answer = failed[0][:_LONGEST_QUOTE] or "(no answer)"  # chat templates refuse an empty turn
        messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": follow_up(failed[1])})
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": messages,
        settings.max_tokens_field: settings.max_tokens,
    }
    if settings.temperature is not None:
        body["temperature"] = settings.temperature
    if settings.structured == "json_schema":
        form = {"name": "nutrition", "strict": True, "schema": schema(settings)}
        body["response_format"] = {"type": "json_schema", "json_schema": form}
    elif settings.structured == "json_object":
        body["response_format"] = {"type": "json_object"}
    return body | settings.extra_body
