"""Our numbers beside the paper's: mean and spread over seeds, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rode.paper.results import Result, incomparable
from rode.paper.tables import METRICS, Tables
from rode_food.atomic import write_json, write_text


@dataclass(frozen=True)
class Cell:
    """One metric of one variant.

    Attributes:
        values: of each seed that measured it.
        mean: None where no run measured it. spread: sample standard deviation; None below two values.
        paper: the number printed, or None.
    """

    values: tuple[float, ...]
    mean: float | None
    spread: float | None
    paper: float | None

    def __str__(self) -> str:
        """ "26.70 ± 0.14", "26.70" of a single run, nothing of none."""
        if self.mean is None:
            return ""
        return f"{self.mean:.2f}" if self.spread is None else f"{self.mean:.2f} ± {self.spread:.2f}"


@dataclass(frozen=True)
class Row:
    """One variant: who it is, what was run of it, and its cells by metric."""

    variant: str
    name: str
    seeds: tuple[int, ...]
    trainable_parameters: int | None
    cells: dict[str, Cell]


@dataclass(frozen=True)
class Report:
    """A table, or the numbers behind a figure.

    Attributes:
        headings: metric -> heading.
        notes: what a reader must know to compare.
    """

    what: str
    title: str
    base: str
    headings: dict[str, str]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def make_cell(results: Iterable[Result], metric: str, paper: float | None) -> Cell:
    """Mean and spread over the results that measured the metric."""
    values = tuple(float(value) for result in results if (value := result["metrics"].get(metric)) is not None)
    mean = statistics.fmean(values) if values else None
    spread = statistics.stdev(values) if len(values) > 1 else None
    return Cell(values, mean, spread, paper)


def make_report(
    tables: Tables, what: str, results: Mapping[str, Sequence[Result]], base: str, *, papers_data: bool = True
) -> Report:
    """The rows of a table from the results of its variants; a row without results has empty cells.

    Args:
        what: name of the table or figure.
        results: variant -> results, for each of its variants.
        base: name of the config that the runs stand on.
        papers_data: False where `base` is another than the table's, so that only our own rows compare with each other.
    """
    item = tables.item(what)
    printed = tables.data[item.data].paper
    rows = []
    for variant in item.variants:
        found = results[variant]
        counts = sorted({result["trainable_parameters"] for result in found})
        numbers = printed.get(variant, {})
        rows.append(
            Row(
                variant,
                tables.name(item, variant),
                tuple(result["seed"] for result in found),
                counts[0]
                if len(counts) == 1
                else None,  # of several, no one is right; a note says why they differ
                {metric: make_cell(found, metric, numbers.get(metric)) for metric in item.metrics},
            )
        )
    notes = []
    less = [METRICS[metric].heading for metric in item.metrics if METRICS[metric].better == "less"]
    if less:
        notes.append(f"less is better: {', '.join(less)}")
    if any(cell.spread is not None for row in rows for cell in row.cells.values()):
        notes.append("mean ± sample standard deviation over seeds")
    if not papers_data and item.metrics and printed:
        notes.append(
            f"ours is {base}, another model or other data than the paper's: compare our rows with each other"
        )
    notes += incomparable(
        {variant: list(results[variant]) for variant in item.variants}, [*tables.swept, *item.differ]
    )
    headings = {metric: METRICS[metric].heading for metric in item.metrics}
    title = f"{item.title} (arXiv 2407.12730)" if printed else item.title
    return Report(what, title, base, headings, tuple(rows), tuple(notes))


def _grid(report: Report) -> list[list[str]]:
    """Rows of text, the first of them the heading. The shorter side lies across: each of its entries takes two columns, or one
    where the paper has no numbers."""
    columns = 2 if any(cell.paper is not None for row in report.rows for cell in row.cells.values()) else 1
    pairs = {
        (row.name, heading): [str(cell), "" if cell.paper is None else f"{cell.paper:g}"]
        for row in report.rows
        for (metric, heading), cell in zip(report.headings.items(), row.cells.values(), strict=True)
        if metric in row.cells
    }
    names, headings = [row.name for row in report.rows], list(report.headings.values())
    counts = [
        "" if row.trainable_parameters is None else f"{row.trainable_parameters:,}" for row in report.rows
    ]
    seeds = [str(len(row.seeds)) if row.seeds else "" for row in report.rows]

    def line(title: str, cells: Iterable[list[str]]) -> list[str]:
        return [title, *(text for pair in cells for text in pair[:columns])]

    if len(names) < len(headings):
        lines = [line("", ([name, "paper"] for name in names))]
        lines += [line(heading, (pairs[name, heading] for name in names)) for heading in headings]
        lines.append(line("trainable parameters", ([count, ""] for count in counts)))
        return [*lines, line("seeds", ([n, ""] for n in seeds))]
    lines = [[*line("", ([heading, "paper"] for heading in headings)), "trainable parameters", "seeds"]]
    for name, count, n in zip(names, counts, seeds, strict=True):
        lines.append([*line(name, (pairs[name, heading] for heading in headings)), count, n])
    return lines


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, padded so that a terminal shows it as a table too; the first row is the heading."""
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cells[0].ljust(widths[0]),
            *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)),
        ]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (widths[0] - 1), *("-" * (width - 1) + ":" for width in widths[1:])]
    return [*map(line, (rows[0], rule, *rows[1:]))]


def format_report(report: Report) -> str:
    """The report as Markdown."""
    title = f"{report.title}; ours: {report.base}"
    table = markdown_table(_grid(report))
    return "\n".join([title, "", *table, "", *(f"- {note}" for note in report.notes)]).rstrip()


def to_dict(report: Report, results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """For JSON: the report, and by variant what each of its results was made with."""
    out = asdict(report)
    for row in out["rows"]:
        keys = ("seed", "machine", "date", "steps", "seconds", "versions")
        row["runs"] = [{key: result.get(key) for key in keys} for result in results[row["variant"]]]
    return out


def write_report(report: Report, results: Mapping[str, Sequence[Result]], folder: Path) -> list[Path]:
    """WHAT.md and WHAT.json in a folder."""
    paths = [folder / f"{report.what}.md", folder / f"{report.what}.json"]
    write_text(paths[0], format_report(report) + "\n")
    write_json(paths[1], to_dict(report, results))
    return paths
