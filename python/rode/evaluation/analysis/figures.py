"""Figures of an analysis. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rode.evaluation.analysis.text import adapters, best_measure
from rode_food.html import new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

COLOURS = ("#2563eb", "#d97706", "#059669", "#64748b")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """(figure, axes[rows][columns])."""
    figure = new_figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False)


def draw_map(
    axis: Axes,
    blocks: Sequence[int],
    rows: Sequence[Sequence[float | None]],
    ranks: Sequence[int | None],
    top: float,
) -> AxesImage:
    """Draw a map of values from 0 to `top`: a column for each transformer block, a row for each expert.

    Args:
        axis: to draw on.
        blocks: numbers of the blocks. rows: for each block, the values by expert; None stays white.
        ranks: of the experts; None where the layers of a block differ.
    """
    grid = [[float("nan") if value is None else value for value in row] for row in rows]
    columns = [list(column) for column in zip(*grid, strict=True)]  # experts over blocks
    image = axis.imshow(columns, vmin=0, vmax=top, cmap="Blues", aspect="auto")
    labels = [f"r {rank}" if rank else f"#{expert}" for expert, rank in enumerate(ranks)]
    axis.set_yticks(range(len(ranks)), labels, fontsize=7)
    step = max(1, len(blocks) // 8)
    axis.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]], fontsize=7)
    return image


def heat_maps(analysis: dict[str, Any], value: str) -> list[tuple[str, Any]]:
    """(stack, figure) for each list of blocks: a row of maps for each task, a column for each kind; experts over blocks."""
    kinds = [kind for kind in analysis["kinds"] if kind != "all"]
    figures = []
    for one in analysis["heat_maps"]:
        tasks, blocks, ranks = analysis["tasks"], one["blocks"], one["ranks"]
        values = [v for t in tasks for k in kinds for row in one[value][t][k] for v in row if v is not None]
        top = 1.0 if value == "open_rate" else max(values, default=1.0) or 1.0
        height = 0.8 + len(tasks) * (0.7 + 0.16 * len(ranks))
        figure, axes = _figure(len(tasks), len(kinds), 3.6 * len(kinds), height)
        for line, task in zip(axes, tasks, strict=True):
            for axis, kind in zip(line, kinds, strict=True):
                image = draw_map(axis, blocks, one[value][task][kind], ranks, top)
                axis.set_title(f"{task}: {kind}", fontsize=9)
        for axis in axes[-1]:
            axis.set_xlabel("block", fontsize=8)
        figure.colorbar(image, ax=axes, label=value.replace("_", " "), shrink=0.8)
        figures.append((one["stack"], figure))
    return figures


def open_rates(analysis: dict[str, Any]) -> Any:
    """Bars: for each task the mean open rate by kind of token."""
    kinds = [kind for kind in analysis["kinds"] if kind != "all"]
    figure, axes = _figure(1, 1, 7, 2.8)
    axis = axes[0][0]
    for n, kind in enumerate(kinds):
        heights = [100 * (analysis["open_by_task"][task][kind] or 0) for task in analysis["tasks"]]
        at = [t + (n - (len(kinds) - 1) / 2) * 0.25 for t in range(len(heights))]
        axis.bar(at, heights, width=0.23, label=kind, color=COLOURS[n])
    axis.set_xticks(range(len(analysis["tasks"])), analysis["tasks"])
    axis.set_ylabel("open rate, %")
    axis.set_ylim(0, 100)
    figure.legend(loc="outside right upper", fontsize=8)
    return figure


def sharing(analysis: dict[str, Any]) -> Any:
    """Maps of tasks against tasks by kind of token; on the diagonal the halves of one task. None without a pair."""
    measure, tasks = best_measure(analysis), analysis["tasks"]
    entries = [e for e in analysis["sharing"] if e["measure"] == measure and e["kind"] != "all"]
    kinds = list(dict.fromkeys(entry["kind"] for entry in entries))
    if not entries:
        return None
    figure, axes = _figure(1, len(kinds), 3.4 * len(kinds), 3.4)
    for axis, kind in zip(axes[0], kinds, strict=True):
        grid = [[float("nan")] * len(tasks) for _ in tasks]
        for entry in (e for e in entries if e["kind"] == kind):
            a, b = (tasks.index(task) for task in entry["tasks"])
            grid[a][b] = grid[b][a] = entry["jaccard"]
            for n, task in zip((a, b), entry["tasks"], strict=True):
                half = entry["halves"][task]
                grid[n][n] = float("nan") if half is None else half
        axis.imshow(grid, vmin=0, vmax=1, cmap="Blues")
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                if value == value:
                    colour = "white" if value > 0.6 else "black"
                    axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize=8)
        axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
        axis.set_title(f"{kind} tokens", fontsize=9)
    return figure


def sparsity(analysis: dict[str, Any]) -> Any:
    """Bars: effective number of experts by kind of token, of the adapter and of the one set against it."""
    kinds = [k for k in analysis["kinds"] if analysis["sparsity"]["all tasks"][k] is not None]
    figure, axes = _figure(1, 2, 9, 2.8)
    shown = adapters(analysis)
    for axis, name, title in zip(
        axes[0], ("zeros", "effective"), ("gates exactly 0, %", "effective experts per token"), strict=True
    ):
        for n, one in enumerate(shown):
            found = [one["sparsity"]["all tasks"][kind] for kind in kinds]
            heights = [0 if s is None else s[name] * (100 if name == "zeros" else 1) for s in found]
            at = [k + (n - (len(shown) - 1) / 2) * 0.36 for k in range(len(kinds))]
            axis.bar(at, heights, width=0.33, label=f"{one['adapter']} ({one['gate']})", color=COLOURS[n])
        axis.set_xticks(range(len(kinds)), kinds, fontsize=8)
        axis.set_title(title, fontsize=9)
    figure.legend(*axes[0][1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure
