"""Differences between variants as a table and as a forest plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rode.paper.answers import Answer, answers_path, read_answers
from rode.paper.comparisons import Difference, compare
from rode.paper.report import markdown_table
from rode.paper.results import Result, incomparable, result_path
from rode.paper.tables import METRICS, Item, Tables
from rode_food.atomic import write_json, write_text
from rode_food.html import new_figure, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SURE, OPEN = "#2563eb", "#94a3b8"


def read_all(
    folder: Path, base: str, results: Mapping[str, Sequence[Result]]
) -> dict[str, dict[int, list[Answer]]]:
    """Variant -> seed -> answers, of the results that there are.

    Raises:
        FileNotFoundError: a result without its answers, and what to do.
    """
    found: dict[str, dict[int, list[Answer]]] = {}
    for variant, runs in results.items():
        found[variant] = {}
        for result in runs:
            file = answers_path(result_path(folder, base, variant, result["seed"]))
            if not file.is_file():
                raise FileNotFoundError(
                    f"{file}: no such file; set evaluation.keep_answers=true and run {variant} seed {result['seed']} again"
                )
            found[variant][result["seed"]] = read_answers(file)
    return found


def differences_of(item: Item, answers: Mapping[str, Mapping[int, Sequence[Answer]]]) -> list[Difference]:
    """The item's comparisons in their metrics."""
    return compare(item.comparisons, item.metrics, answers)


def format_differences(title: str, found: Sequence[Difference], notes: Sequence[str] = ()) -> str:
    """Markdown: a block for each metric."""
    seeds = len(found[0].by_seed)
    lines = [f"{title}; {seeds} seeds", ""]
    heading = ["", "first", "second", "difference", "95 %", "p", "p (Holm)", "effect", "detectable", "(Holm)"]
    for metric in dict.fromkeys(one.metric for one in found):
        shown = METRICS[metric]
        mine = [one for one in found if one.metric == metric]
        rows = [
            [
                one.comparison,
                f"{one.first:.2f}",
                f"{one.second:.2f}",
                f"{one.mean:+.2f}",
                f"{one.low:+.2f} to {one.high:+.2f}",
                f"{one.p:.3f}",
                f"{one.p_holm:.3f}",
                "" if one.effect is None else f"{one.effect:+.2f}",
                f"{one.detectable:.2f}",
                f"{one.detectable_holm:.2f}",
            ]
            for one in mine
        ]
        lines += [f"{shown.heading} ({shown.better} is better), {mine[0].groups} groups", ""]
        lines += [*markdown_table([heading, *rows]), ""]
    lines += [
        f"- difference: mean over {seeds} seeds of first - second; both sides start alike and see the same pictures",
        "- 95 %: bootstrap over seeds and groups (objects, products, dishes), t with as many degrees of freedom as seeds less one",
        f"- Holm: over all {len(found)} differences here",
        "- effect: mean over standard deviation of the differences by seed",
        "- detectable: the smallest true difference that these runs find with 80 %, at 5 % and at Holm's strictest level",
        *(f"- {note}" for note in notes),
    ]
    return "\n".join(lines)


def draw_forest(found: Sequence[Difference]) -> Figure:
    """A panel for each metric, a line for each comparison: the interval, the mean, and a dot for each seed.

    The side on which the first variant is better is right in every panel. Blue: Holm's p is below 5 %.
    """
    metrics = list(dict.fromkeys(one.metric for one in found))
    names = list(dict.fromkeys(one.comparison for one in found))
    figure = new_figure(figsize=(2.2 + 2.4 * len(metrics), 1.3 + 0.5 * len(names)))
    panels = figure.subplots(1, len(metrics), squeeze=False, sharey=True)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        shown = METRICS[metric]
        for one in found:
            if one.metric != metric:
                continue
            place, colour = names.index(one.comparison), SURE if one.p_holm < 0.05 else OPEN
            axes.plot([one.low, one.high], [place, place], color=colour, lw=2)
            axes.plot([one.mean], [place], "s", color=colour, ms=6)
            axes.plot(one.by_seed, [place + 0.22] * len(one.by_seed), ".", color=colour, ms=4, alpha=0.7)
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(f"{shown.heading} ({shown.better} is better)", fontsize=9)
        axes.set_xlabel("difference", fontsize=8)
        axes.tick_params(labelsize=8)
        if shown.better == "less":
            axes.invert_xaxis()
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def show(
    tables: Tables, what: str, results: Mapping[str, list[Result]], folder: Path, base: str
) -> tuple[str, list[Path]]:
    """The comparisons of an item: the text, and the files that were written.

    Args:
        tables, what: the item.
        results: variant -> results, for each of its variants.
        folder: of results.
        base: name of the config that the runs stand on.
    """
    item = tables.item(what)
    found = differences_of(item, read_all(folder, base, results))
    text = format_differences(item.title, found, incomparable(results, [*tables.swept, *item.differ]))
    paths = [folder / base / f"{what}{suffix}" for suffix in (".md", ".json", ".svg")]
    write_text(paths[0], text + "\n")
    write_json(paths[1], [asdict(one) | {"mean": one.mean} for one in found])
    write_text(paths[2], svg(draw_forest(found)))
    return text, paths
