"""An audit as text and as one HTML page."""

from __future__ import annotations

import html
from typing import Any

from rode_food.html import page, table
from rode_food.text_table import text_table
from rode_food.usda.tables import NUTRIENTS

_HEAD = ("food group", "n", "mass %", "energy %", *(f"{n} {k}" for n in NUTRIENTS for k in ("pMAE", "bias")))


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:+.1f}" if sign else f"{value:.1f}"


def _errors(row: dict[str, Any]) -> list[str]:
    return [cell for n in NUTRIENTS for cell in (_number(row["pmae"][n]), _number(row["bias"][n], sign=True))]


def _group_rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, row in result["groups"].items():
        shares = [_number(None if row[k] is None else 100 * row[k]) for k in ("mass_share", "energy_share")]
        rows.append([name, str(row["count"]), *shares, *_errors(row)])
    return rows


def _worst_rows(result: dict[str, Any]) -> list[list[str]]:
    return [
        [row["name"], row["usda"][:60], str(row["count"]), f"{row['energy_error']:.0f}", *_errors(row)]
        for row in result["worst"]
    ]


_WORST_HEAD = ("name", "USDA food", "n", "kcal off", *_HEAD[4:])


def _facts(result: dict[str, Any]) -> list[str]:
    counts = result["counts"]

    def of(part: str, whole: str) -> str:
        n, total = counts.get(part, 0), counts.get(whole, 0)
        return f"{n} of {total}" + (f" ({100 * n / total:.1f} %)" if total else "")

    facts = [
        f"ingredients with a food chosen by hand: {of('ingredients_map', 'ingredients')}; "
        f"found automatically: {of('ingredients_automatic', 'ingredients')}",
        f"lines that tell grams: {of('lines_with_grams', 'ingredients')}; "
        f"with a food chosen by hand too: {of('lines_with_grams_and_food', 'ingredients')}",
        f"dishes checked: {of('dishes_checked', 'dishes')}; not checkable: {counts.get('dishes_not_checkable', 0)}; "
        f"without a nutrition label: {counts.get('dishes_unlabelled', 0)}",
    ]
    if counts.get("ingredients_lacking"):
        facts.append(
            f"ingredients whose food the table lacks, although it was chosen by hand: {of('ingredients_lacking', 'ingredients')}; "
            "labels and names may be right, and SR Legacy or the full download has these foods"
        )
    if counts.get("dishes_checked"):
        outside = ", ".join(f"{name} {n}" for name, n in result["dishes"]["outside"].items()) or "none"
        facts.append(f"dishes that agree: {of('dishes_agreeing', 'dishes_checked')}; outside by {outside}")
        dish = result["dishes"]
        facts.append(
            "dishes, pMAE (bias) in %: "
            + ", ".join(
                f"{n} {_number(dish['pmae'][n])} ({_number(dish['bias'][n], sign=True)})" for n in NUTRIENTS
            )
        )
    return facts


_LISTS = {
    "lacking": "foods that the table lacks",
    "untold": "names without a food chosen by hand",
    "no_grams": "lines without grams",
}


def audit_text(result: dict[str, Any]) -> str:
    """The text for a terminal."""
    parts = ["\n".join(_facts(result))]
    if result["groups"]:
        parts += ["label against USDA, in %:\n" + text_table([_HEAD, *_group_rows(result)])]
        parts += ["names whose labels differ most:\n" + text_table([_WORST_HEAD, *_worst_rows(result)])]
    for key, title in _LISTS.items():
        if result[key]:
            parts.append(f"{title}: " + ", ".join(f"{name} {n}" for name, n in result[key].items()))
    return "\n\n".join(parts)


def audit_html(result: dict[str, Any], title: str) -> str:
    """One page that needs nothing else."""
    body = [f"<h1>{html.escape(title)}</h1>"]
    body += [f"<p>{html.escape(fact)}</p>" for fact in _facts(result)]
    body.append("<p>pMAE: 100 x sum |label - USDA| / sum USDA; bias: the same without the bars.</p>")
    if result["groups"]:
        body += ["<h2>By food group</h2>", table([_HEAD, *_group_rows(result)])]
        body += ["<h2>Names whose labels differ most</h2>", table([_WORST_HEAD, *_worst_rows(result)])]
    for key, title in _LISTS.items():
        if result[key]:
            body += [
                f"<h2>{title[0].upper()}{title[1:]}</h2>",
                table([["", "n"], *([k, str(n)] for k, n in result[key].items())]),
            ]
    return page(title, body)
