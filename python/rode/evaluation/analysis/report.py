"""The page of an analysis: plain HTML, figures embedded, no script."""

from __future__ import annotations

import html
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode.evaluation.analysis import figures, text
from rode_food.atomic import write_json, write_text
from rode_food.html import bullets, drawing, page, table

if TYPE_CHECKING:
    pass

SHOWN = 40
"""Experts named in one list; analysis.json has them all."""

SHARING = (
    "Similarity of use is the weighted Jaccard index, sum of minima over sum of maxima of the two tasks' use of each expert: 1 "
    "for the same use, 0 for nothing in common. It means something only between its reference levels. <b>Experts at random</b>: "
    "the second task used experts as much, but others of the same layer; what is no higher than this is no sharing. <b>Task at "
    "random</b>: examples exchanged between the tasks; <b>p</b> is how often that is as low as what was found, so a large p says "
    "that the router does not tell the tasks apart. <b>Halves of one task</b>: as alike as so few examples can be. "
    "Image tokens stand before the question and cannot know the task."
)
SPARSITY = (
    "The effective number of experts is the exponential of the entropy of a token's gates, made to sum to 1: N for equal gates, 1 "
    "for a single one. Softmax gates are never exactly 0, and the effective number says how far they are from it. Tokens that open "
    "no expert are left out of both means."
)


def write_report(directory: str | os.PathLike[str], analysis: dict[str, Any]) -> Path:
    """Write analysis.json and report.html; the page's path."""
    directory = Path(directory)
    report = _page(analysis)
    write_json(directory / "analysis.json", analysis, allow_nan=False)
    write_text(directory / "report.html", report)
    return directory / "report.html"


def _page(analysis: dict[str, Any]) -> str:
    title = f"Router of {analysis['adapter']}"
    examples = ", ".join(f"{task} {count}" for task, count in analysis["examples"].items())
    answers = "true answers" if analysis["answers"] == "truth" else "the model's own answers"
    measure = text.best_measure(analysis)
    sections = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="small">{html.escape(analysis["gate"])} gates; {len(analysis["units"])} experts in all layers; examples of '
        f"split {analysis['split']}: {examples}; run over prompts and {answers}.</p>",
        f"<h2>Open rate</h2>{table(text.open_rows(analysis))}{drawing(figures.open_rates(analysis), 'Open rate by task')}",
        *_maps(analysis, "open_rate", "Open rate by block and expert"),
        *_maps(analysis, "mean_gate", "Mean gate by block and expert, closed ones counted as 0"),
        *(
            part
            for other in text.adapters(analysis)[1:]
            for part in _maps(other, "mean_gate", f"Mean gate of {other['adapter']} ({other['gate']})")
        ),
        f"<h2>Dead experts</h2>{_units(analysis)}",
    ]
    if analysis["sharing"]:
        sections.append(f'<h2>Which experts tasks share</h2><p class="small">{SHARING}</p>')
        caption = f"By {measure.replace('_', ' ')}; on the diagonal, halves of one task"
        sections.append(drawing(figures.sharing(analysis), caption))
        sections += [_shared(analysis, kind, measure) for kind in analysis["kinds"]]
    sections += [
        f'<h2>Sparsity</h2><p class="small">{SPARSITY}</p>{table(text.sparsity_rows(analysis))}',
        drawing(figures.sparsity(analysis), "Exact zeros and effective number of experts"),
        f"<h2>Loss per answer token</h2>{table(text.loss_rows(analysis))}",
    ]
    return page(title, sections)


def _maps(analysis: dict[str, Any], value: str, caption: str) -> list[str]:
    return [drawing(figure, f"{caption}: {stack}") for stack, figure in figures.heat_maps(analysis, value)]


def _details(summary: str, items: list[str]) -> str:
    if not items:
        return f"<p>{html.escape(summary)}</p>"
    more = [f"and {len(items) - SHOWN} more, see analysis.json"] if len(items) > SHOWN else []
    listed = bullets(html.escape(item) for item in [*items[:SHOWN], *more])
    return f"<details><summary>{html.escape(summary)}</summary>{listed}</details>"


def _units(analysis: dict[str, Any]) -> str:
    return "".join(
        _details(what, [f"{text.unit_name(u)}: at most {text.percent(u['open_rate'])} %" for u in units])
        for what, units in text.counts(analysis)
    )


def _shared(analysis: dict[str, Any], kind: str, measure: str) -> str:
    rows = text.sharing_rows(analysis, kind, measure)
    if len(rows) == 1:
        return ""
    out = [f"<h3>{html.escape(kind)} tokens</h3>{table(rows)}"]
    for entry in analysis["sharing"]:
        if entry["kind"] == kind and entry["measure"] == measure:
            a, b = entry["tasks"]
            items = [
                f"{what}: {text.unit_name(analysis['units'][i])}: {text.percent(x)} and {text.percent(y)} %"
                for key, what in (
                    ("top_both", "both"),
                    ("top_first", f"rather {a}"),
                    ("top_second", f"rather {b}"),
                )
                for i, x, y in entry[key]
            ]
            used = f"both use {entry['both']}, {a} only {entry['first']}, {b} only {entry['second']}"
            out.append(_details(f"{a} & {b}: {used}, neither {entry['neither']}", items))
    return "".join(out)
