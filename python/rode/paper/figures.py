"""The paper's Figures 6 to 8 with our numbers beside the paper's. Variants that were not run are left out, or say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rode.paper.report import Report
from rode.paper.results import Result
from rode.paper.tables import METRICS, Tables
from rode_food.atomic import replacing
from rode_food.html import new_figure, png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PAPER = "#2563eb", "#94a3b8"
MARKERS = "osD^vP"
"""Of ranks, in Figure 8; its colours are of routers."""
HeatMap = tuple[list[int], list[list[float | None]]]


def mean_heat_map(results: Sequence[Result], kind: str = "all") -> HeatMap:
    """(blocks, rows of mean gates by expert): the mean over runs, of those that have the cell; ([], []) without any."""
    cells: dict[tuple[int, int], list[float]] = {}
    for result in results:
        gates = (result.get("gates") or {}).get(kind, {"blocks": [], "mean_gate": []})
        for block, row in zip(gates["blocks"], gates["mean_gate"], strict=True):
            for expert, value in enumerate(row):
                if value is not None:
                    cells.setdefault((block, expert), []).append(value)
    blocks = sorted({block for block, _ in cells})
    experts = 1 + max((expert for _, expert in cells), default=-1)
    mean = {key: sum(values) / len(values) for key, values in cells.items()}
    return blocks, [[mean.get((block, expert)) for expert in range(experts)] for block in blocks]


def heat_maps(report: Report, results: Mapping[str, Sequence[Result]], tables: Tables) -> Figure:
    """Figure 6: mean router output by transformer block and expert, a panel for each variant."""
    figure = new_figure(figsize=(1 + 3.2 * len(report.rows), 5.2))
    panels = figure.subplots(1, len(report.rows), squeeze=False)[0]
    for axes, row in zip(panels, report.rows, strict=True):
        axes.set_title(row.name, fontsize=10)
        blocks, rows = mean_heat_map(results[row.variant])
        if not rows:
            _nothing(axes)
            continue
        values = [[float("nan") if value is None else value for value in line] for line in rows]
        image = axes.imshow(values, origin="lower", aspect="auto", cmap="viridis", vmin=0.0)
        ranks = tables.variants[row.variant].ranks.split(",")
        axes.set_xticks(
            range(len(values[0])), [f"r={r}" for r in ranks] if len(ranks) == len(values[0]) else None
        )
        shown = range(0, len(blocks), max(1, len(blocks) // 8))
        axes.set_yticks(list(shown), [str(blocks[i]) for i in shown])
        axes.set_xlabel("expert")
        axes.set_ylabel("transformer block")
        figure.colorbar(image, ax=axes, label="mean gate")
    return figure


def bars(report: Report) -> Figure:
    """Figure 7: a panel for each metric, for each variant our bar and the paper's."""
    from matplotlib.patches import Patch

    figure = new_figure(figsize=(3.1 * len(report.headings), 3.4))
    panels = figure.subplots(1, len(report.headings), squeeze=False)[0]
    for axes, metric in zip(panels, report.headings, strict=True):
        _label(axes, metric)
        for place, row in enumerate(report.rows):
            cell = row.cells[metric]
            if cell.mean is not None:
                axes.bar(place - 0.2, cell.mean, 0.38, yerr=cell.spread, capsize=3, color=OURS)
            if cell.paper is not None:
                axes.bar(place + 0.2, cell.paper, 0.38, color=PAPER)
        axes.set_xticks(range(len(report.rows)), [row.name for row in report.rows])
        axes.set_xlim(-0.6, len(report.rows) - 0.4)  # the place of a bar that is not there stays
    marks = [Patch(color=OURS, label="ours"), Patch(color=PAPER, label="paper")]
    figure.legend(handles=marks, loc="outside lower center", ncols=2, frameon=False)
    return figure


def parameters(report: Report, tables: Tables) -> Figure:
    """Figure 8: trainable parameters against each metric, the paper's runs above, ours (of our model) below."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    figure = new_figure(figsize=(3.4 * len(report.headings), 6.6))
    panels = figure.subplots(2, len(report.headings), squeeze=False)
    adapted = tables.data[tables.item(report.what).data].adapted
    variants = [tables.variants[row.variant] for row in report.rows]
    routers, ranks = (list(dict.fromkeys(getattr(v, part) for v in variants)) for part in ("router", "ranks"))
    styles: list[dict[str, Any]] = [
        {
            "color": f"C{routers.index(v.router)}",
            "marker": MARKERS[ranks.index(v.ranks) % len(MARKERS)],
            "ls": "none",
        }
        for v in variants
    ]
    for (above, below), metric in zip(panels.T, report.headings, strict=True):
        for row, variant, style in zip(report.rows, variants, styles, strict=True):
            cell = row.cells[metric]
            if cell.paper is not None and adapted is not None:
                above.errorbar([adapted.parameters(variant)], [cell.paper], **style)
            if cell.mean is not None and row.trainable_parameters is not None:
                spread = None if cell.spread is None else [cell.spread]
                below.errorbar([row.trainable_parameters], [cell.mean], yerr=spread, capsize=3, **style)
        for axes, whose in ((above, "paper"), (below, "ours")):
            _label(axes, metric)
            axes.set_xlabel(f"trainable parameters ({whose})", fontsize=9)
            axes.xaxis.set_major_formatter(EngFormatter())
            axes.margins(0.15)
            if not axes.containers:
                _nothing(axes)
    marks = [Line2D([], [], label=row.name, **style) for row, style in zip(report.rows, styles, strict=True)]
    figure.legend(handles=marks, loc="outside lower center", ncols=5, frameon=False)
    return figure


def _label(axes: Axes, metric: str) -> None:
    shown = METRICS[metric]
    axes.set_title(f"{shown.heading} ({shown.better} is better)", fontsize=10)


def _nothing(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not run", ha="center", va="center", transform=axes.transAxes, color=PAPER)
    axes.set_xticks([])
    axes.set_yticks([])


def draw(report: Report, results: Mapping[str, Sequence[Result]], tables: Tables) -> Figure | None:
    """The figure of a report; None for a table.

    Raises:
        ImportError: matplotlib is not installed.
    """
    kind = tables.item(report.what).kind
    if kind == "heat_map":
        return heat_maps(report, results, tables)
    if kind == "bars":
        return bars(report)
    return parameters(report, tables) if kind == "parameters" else None


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Write NAME.png in a folder (made if need be); its path."""
    path = folder / f"{name}.png"
    with replacing(path, "wb") as file:
        file.write(png(figure, dpi=150))
    return path
