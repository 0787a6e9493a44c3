"""Statistics as pictures and as one page: our row of the paper's Table 1, its Figure 3, lengths, nutrition, ingredients."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode_food.atomic import replacing, write_json, write_text
from rode_food.html import new_figure, page, picture, png, table
from rode_food.statistics import CHARACTERS_PER_TOKEN, LENGTHS, SHOWN_SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import StepPatch

Statistics = Mapping[str, Any]
COLOURS = {"train": "#2563eb", "val": "#d97706", "test": "#059669", "no split": "#64748b"}
BAR, REST = "#2563eb", "#cbd5e1"
LABEL_LENGTH = 36
"""Characters of a category or ingredient beside its bar."""
TITLES = {
    "ingredients": "ingredients a record",
    "steps": "steps a recipe",
    "words": "words a recipe",
    "tokens": "tokens a recipe, about",
    "mass": "mass, g",
    "energy": "energy, kcal",
    "fat": "fat, g",
    "protein": "protein, g",
    "carb": "carbohydrate, g",
}
KNOWN = {
    "category": "category",
    "ingredients": "ingredients",
    "amounts": "amount of every ingredient",
    "recipe": "recipe",
    "nutrition": "nutrition of the dish",
    "ingredient_nutrition": "nutrition of every ingredient",
    "micronutrients": "micronutrients of the dish",
    "conversation": "questions of its own",
}
MICRONUTRIENTS = 20
"""Bars of the coverage figure; the page lists all."""


def write_statistics(
    folder: str | os.PathLike[str], statistics: Statistics, *, name: str, top: int = 50
) -> list[Path]:
    """Writes statistics.json, table1.md, the figures as PNG and statistics.html, which holds them all.

    Args:
        folder: made if need be; every file is written aside, then renamed.
        statistics: of `rode_food.statistics.collect`.
        name: of the data set.
        top: categories in Figure 3; the rest are one bar.

    Returns:
        The files, the page last.

    Raises:
        ImportError: without matplotlib. ValueError: for a `top` below 1.
    """
    if top < 1:
        raise ValueError(f"top: expected at least 1 category, got {top}")
    folder = Path(folder)
    pictures = {key: png(figure) for key, figure in figures(statistics, top).items()}
    write_json(folder / "statistics.json", {"name": name, **statistics})
    write_text(folder / "table1.md", table1(statistics, name))
    for key, data in pictures.items():
        with replacing(folder / f"{key}.png", "wb") as out:
            out.write(data)
    write_text(folder / "statistics.html", _page(statistics, name, pictures, top))
    files = ["statistics.json", "table1.md", *(f"{key}.png" for key in pictures), "statistics.html"]
    return [folder / file for file in files]


# --- text


def number(value: float) -> str:
    """Three digits or more, never an exponent: 12,345  320  31.6  1.55  0.0042."""
    if float(value).is_integer() or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def percent(part: int, whole: int) -> str:
    """ "98.2 %"; 100 % and 0 % only where it is all or none."""
    if part in (0, whole) or not whole:
        return "100 %" if part else "0 %"
    return f"{min(99.9, max(0.1, 100 * part / whole)):.1f} %"


def table1_rows(statistics: Statistics, name: str) -> list[list[str]]:
    """Heading and our row: images, and how many of them have what the paper's Table 1 asks of a data set."""
    records, known = statistics["records"], statistics["known"]

    def share(key: str) -> str:
        return percent(known[key], records)

    return [
        [
            "data set",
            "images",
            "category",
            "ingredients",
            "with amounts",
            "recipe",
            "nutrition",
            "by ingredient",
        ],
        [
            name,
            number(statistics["pictures"]["all"]),
            f"{share('category')} ({number(statistics['categories']['distinct'])} classes)",
            share("ingredients"),
            *(share(key) for key in ("amounts", "recipe", "nutrition", "ingredient_nutrition")),
        ],
    ]


def table1(statistics: Statistics, name: str) -> str:
    """Markdown; a name is shown as it is, whatever a reader of Markdown would make of it."""
    rows = table1_rows(statistics, name)
    head, row = (
        [re.sub(r"([\\|`*_\[\]])", r"\\\1", html.escape(cell, quote=False)) for cell in line] for line in rows
    )
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, row))


def summary_rows(distributions: Mapping[str, Any]) -> list[list[str]]:
    """For each number and split: how many records have it, quartiles, mean, range."""
    rows = [["", "split", "records", "min", "first quartile", "median", "third quartile", "max", "mean"]]
    for key, distribution in distributions.items():
        summaries = distribution["summary"] if distribution else {}
        if len(summaries) == 2:  # one split is the same as all
            summaries = {"all": summaries["all"]}
        for split, s in summaries.items():
            cells = [number(s[k]) for k in ("n", "min", "q1", "median", "q3", "max", "mean")]
            rows.append([TITLES[key] if split == "all" else "", split, *cells])
    return rows


def _page(statistics: Statistics, name: str, pictures: Mapping[str, bytes], top: int) -> str:
    records, known = statistics["records"], statistics["known"]
    categories, ingredients = statistics["categories"], statistics["ingredients"]
    mentions = ingredients["mentions"]

    def shown(key: str, caption: str) -> str:
        return picture(pictures[key], "image/png", caption) if key in pictures else ""

    def counted(part: int, whole: int) -> list[str]:
        return [number(part), percent(part, whole)]

    coverage = [["", "records", "share"], *([KNOWN[k], *counted(n, records)] for k, n in known.items())]
    amounts = [
        ["of all mentions of ingredients", "mentions", "share"],
        ["all", *counted(mentions["all"], mentions["all"])],
    ]
    for key, what in (
        ("amount", "with an amount or mass"),
        ("mass", "with a mass"),
        ("nutrition", "with nutrition"),
    ):
        amounts.append([what, *counted(mentions[key], mentions["all"])])
    micronutrients = [["micronutrient", "records", "share", "units"]]
    for entry in statistics["micronutrients"]:
        units = ", ".join(f"{unit} {number(n)}" for unit, n in entry["units"].items())
        micronutrients.append([entry["name"], *counted(entry["records"], records), units])
    sections = [
        f"<h1>{html.escape(name)}</h1>",
        f'<p class="small">{number(records)} records of {html.escape(", ".join(statistics["sources"]) or "no source")}: '
        f"{', '.join(f'{number(n)} {split}' for split, n in statistics['splits'].items()) or 'none'}.</p>",
        f"<h2>Table 1: what the images are labelled with</h2>{table(table1_rows(statistics, name))}",
        table(coverage),
        shown("coverage", "Records that have each label, and (green) each micronutrient"),
    ]
    if categories["all"]:
        sections += [
            f'<h2>Figure 3: categories</h2><p class="small">{number(categories["distinct"])} categories, as even as '
            f"{number(categories['effective'])} equally common ones (exponential of the entropy).</p>",
            shown("figure3", f"Records by category, the {min(top, categories['distinct'])} commonest"),
        ]
    if any(statistics["lengths"].values()):
        sections += [
            f'<h2>Lengths</h2><p class="small">Of records that have ingredients, or a recipe. Tokens are characters / '
            f"{CHARACTERS_PER_TOKEN}, the rule of thumb for English.</p>",
            table(summary_rows(statistics["lengths"])),
            shown("lengths", DISTRIBUTION),
        ]
    if any(statistics["nutrition"].values()):
        sections += [
            "<h2>Nutrition of a dish</h2>",
            table(summary_rows(statistics["nutrition"])),
            shown("nutrition", DISTRIBUTION),
        ]
    if len(micronutrients) > 1:
        sections.append(f"<h2>Micronutrients</h2>{table(micronutrients)}")
    if mentions["all"]:
        sections += [
            f'<h2>Ingredients</h2><p class="small">{number(ingredients["distinct"])} names, in lower case and without digits and '
            "punctuation; plurals and synonyms are not merged.</p>",
            table(amounts),
            shown("ingredients", f"The {len(ingredients['top'])} commonest ingredients"),
        ]
    return page(f"Statistics of {name}", sections)


# --- figures

DISTRIBUTION = (
    "Share of each split's records in a bin; above, the median (dot) and the quartiles (bar) of each split. "
    f"The {100 * (1 - SHOWN_SHARE):.0f} % with the largest values may lie beyond the right edge"
)


def figures(statistics: Statistics, top: int) -> dict[str, Figure]:
    """Name of the PNG -> figure; what no record has is not drawn."""
    records = statistics["records"]
    out = {}
    if records:
        out["coverage"] = _coverage(statistics)
    categories = statistics["categories"]["all"]
    if categories:
        out["figure3"] = _figure3(categories, top, records)
    for name, columns in (("lengths", 2), ("nutrition", 3)):
        found = {key: value for key, value in statistics[name].items() if value}
        if found:
            out[name] = _distributions(found, columns)
    if statistics["ingredients"]["top"]:
        rows = [(entry["name"], entry["records"]) for entry in statistics["ingredients"]["top"]]
        out["ingredients"] = _bars(rows, "records", statistics["known"]["ingredients"])
    return out


def _short(name: str) -> str:
    return name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1].rstrip() + "…"


def _bars(
    rows: Sequence[tuple[str, float]], unit: str, whole: int, colours: Sequence[str] | None = None
) -> Figure:
    """Horizontal bars from the top down, for names are long; each says its number, and its share of `whole`."""
    figure = new_figure(figsize=(8, 0.9 + 0.22 * len(rows)))
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [value for _, value in rows], height=0.75, color=colours or BAR)
    # literal: a "$" in a name is no mathematics
    axes.set_yticks(places, [_short(name) for name, _ in rows], fontsize=9, parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    largest = max(value for _, value in rows) or 1
    for place, (_, value) in enumerate(rows):
        said = f"{number(value)}  ({percent(int(value), whole)})"
        axes.text(value + 0.008 * largest, place, said, va="center", fontsize=8, color="#475569")
    axes.set_xlim(0, 1.16 * largest)
    axes.set_xlabel(unit)
    _quiet(axes)
    return figure


def _figure3(categories: Sequence[Mapping[str, Any]], top: int, records: int) -> Figure:
    rows = [(entry["name"], entry["records"]) for entry in categories[:top]]
    colours = [BAR] * len(rows)
    if rest := categories[top:]:
        rows.append((f"{number(len(rest))} other categories", sum(entry["records"] for entry in rest)))
        colours.append(REST)
    return _bars(rows, "records", records, colours)


def _coverage(statistics: Statistics) -> Figure:
    rows = [(KNOWN[key], count) for key, count in statistics["known"].items()]
    few = statistics["micronutrients"][:MICRONUTRIENTS]
    rows += [(entry["name"], entry["records"]) for entry in few]
    colours = [BAR] * len(KNOWN) + ["#059669"] * len(few)
    return _bars(rows, "records", statistics["records"], colours)


def _distributions(distributions: Mapping[str, Any], columns: int) -> Figure:
    """A panel for each number: a histogram by split, medians and quartiles above it."""
    from matplotlib.ticker import MaxNLocator

    lines = -(-len(distributions) // columns)
    figure = new_figure(figsize=(4.2 * columns, 0.4 + 2.9 * lines))
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    drawn: dict[str, StepPatch] = {}
    for axes, (key, distribution) in zip(panels, distributions.items(), strict=False):
        histogram, summary = distribution["histogram"], distribution["summary"]
        splits = list(histogram["counts"])
        tallest = 0.0
        for split in splits:
            shares = [100 * n / summary[split]["n"] for n in histogram["counts"][split]]
            tallest = max(tallest, *shares)
            colour = COLOURS[split]
            only = len(splits) == 1
            axes.stairs(shares, histogram["edges"], fill=only, color=colour, alpha=0.35 if only else 0, lw=0)
            drawn[split] = axes.stairs(shares, histogram["edges"], color=colour, lw=1.4, label=split)
        first, last = histogram["edges"][0], histogram["edges"][-1]
        axes.set_xlim(first - 0.02 * (last - first), last)  # room for a median of 0
        axes.xaxis.set_major_locator(MaxNLocator(8, steps=(1, 2, 5, 10), integer=key in LENGTHS))
        axes.set_ylim(0, tallest * (1.12 + 0.08 * len(splits)) or 1)
        for place, split in enumerate(splits):
            s, at = summary[split], 0.95 - 0.065 * place
            across = axes.get_xaxis_transform()  # x in the number's unit, y in shares of the panel
            axes.plot([s["q1"], s["q3"]], [at, at], color=COLOURS[split], lw=2, transform=across)
            axes.plot([s["median"]], [at], "o", color=COLOURS[split], ms=5, transform=across)
        axes.set_xlabel(TITLES[key])
        axes.set_ylabel("records, %")
        _quiet(axes)
    for axes in panels[len(distributions) :]:
        axes.remove()
    if len(drawn) > 1:
        figure.legend(handles=list(drawn.values()), loc="outside upper right", ncols=4, frameon=False)
    return figure


def _quiet(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_formatter(lambda value, _: number(round(value, 6)))
