"""Pictures of what `python -m benchmarks mixture --json` wrote: time by open share, time by tokens, time over the frozen layer's.

open-share.svg has the shape that was timed with most open shares, tokens.svg and overhead.svg the one that was timed with most
numbers of tokens. A panel for each dtype and pass; bars are quartiles. A picture for which the file has no two points is left out,
and said so.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
NEEDED = (
    *(
        "tokens",
        "in_features",
        "out_features",
        "ranks",
        "run",
        "dtype",
        "open",
        "open_share",
        "pass",
        "backend",
    ),
    *("seconds", "frozen_seconds", "of_frozen", "roofline"),
)
ABOUT = ("machine", "threads", "torch", "date")
PLAIN = {"packed": "#0f766e", "loop": "#b45309", "compiled packed": "#14b8a6", "compiled loop": "#f59e0b"}
OURS = ("#2563eb", "#7c3aed", "#db2777")
"""Of backends."""
GREY = "#94a3b8"
SAVING = {"svg.hashsalt": "rode", "svg.fonttype": "none"}
"""One set of numbers, one SVG."""


def read(file: str) -> dict[str, Any]:
    """The contents of a file of `mixture`.

    Raises:
        SystemExit: it is none; in a line, why.
    """
    try:
        found = json.loads(Path(file).read_text())
    except OSError as error:
        raise SystemExit(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise SystemExit(f"{file}: not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("benchmark") != "mixture":
        raise SystemExit(f"{file}: not written by `python -m benchmarks mixture --json`")
    missing = [name for name in ABOUT if name not in found]
    if missing:
        raise SystemExit(f"{file}: has no {', '.join(missing)}")
    if not found.get("rows"):
        raise SystemExit(f"{file}: has no rows")
    for i, row in enumerate(found["rows"]):
        missing = [name for name in NEEDED if name not in row]
        if missing:
            raise SystemExit(f"{file}: row {i} has no {', '.join(missing)}")
    return found


def most(rows: Sequence[Row], same: Sequence[str], by: str) -> list[Row]:
    """The group of rows that agree in `same` with most values of `by`; empty where no group has two."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[json.dumps([row.get(name) for name in same])].append(row)
    best = max(groups.values(), key=lambda group: len({row[by] for row in group}))
    return best if len({row[by] for row in best}) > 1 else []


def shape(row: Row) -> str:
    ranks = row["ranks"]
    equal = len(ranks) > 1 and len(set(ranks)) == 1
    experts = f"{len(ranks)} experts of rank {ranks[0]}" if equal else f"ranks {', '.join(map(str, ranks))}"
    return f"K = {row['in_features']}, O = {row['out_features']}, {experts}"


Points = Callable[[Row], dict[str, dict[str, float]]]


def times(row: Row) -> dict[str, dict[str, float]]:
    """Milliseconds of each form; the roofline too, where it is known."""
    found = dict(row["seconds"])
    if row["roofline"]:
        found["roofline"] = dict.fromkeys(("median", "low", "high"), row["roofline"]["seconds"])
    return {
        name: {part: 1000 * seconds for part, seconds in spread.items()} for name, spread in found.items()
    }


def over_frozen(row: Row) -> dict[str, dict[str, float]]:
    """In percent of the frozen layer's median time: of every form alike by medians. Ratios per round (`of_frozen`) are
    known of the backend only."""
    frozen = row["frozen_seconds"]["median"]
    return {
        name: {part: 100 * seconds / frozen for part, seconds in spread.items()}
        for name, spread in row["seconds"].items()
    }


def panels(rows: Sequence[Row], by: str, points: Points, labels: tuple[str, str], title: str) -> Figure:
    """A panel for each dtype (columns) and pass (rows), a line for each form."""
    from matplotlib.figure import Figure  # without pyplot: nothing global, and no display
    from matplotlib.ticker import LogLocator

    dtypes, passes, backends = (
        list(dict.fromkeys(row[name] for row in rows)) for name in ("dtype", "pass", "backend")
    )
    colours = {**PLAIN, "roofline": GREY, **dict(zip(backends, OURS, strict=False))}
    figure = Figure(figsize=(1 + 4.2 * len(dtypes), 1 + 2.8 * len(passes)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    grid = figure.subplots(len(passes), len(dtypes), squeeze=False)
    handles: dict[str, Any] = {}
    for i, what in enumerate(passes):
        for j, dtype in enumerate(dtypes):
            axes, lines = grid[i][j], defaultdict(dict)
            for row in rows:
                if (row["pass"], row["dtype"]) == (what, dtype):
                    for name, point in points(row).items():
                        lines[name][row[by]] = point
            for name, line in lines.items():
                x = sorted(line)
                y = [line[at]["median"] for at in x]
                bars = [[line[at]["median"] - line[at]["low"] for at in x]]
                bars.append([line[at]["high"] - line[at]["median"] for at in x])
                style = (
                    dict(linestyle="--") if name == "roofline" else dict(yerr=bars, marker="o", markersize=3)
                )
                handles[name] = axes.errorbar(x, y, color=colours[name], linewidth=1.2, **style)
            axes.set_title(f"{what}, {dtype}", fontsize=9)
            axes.set_xlabel(labels[0], fontsize=8)
            axes.set_ylabel(labels[1], fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
            if by == "tokens":
                axes.set_xscale("log")
                axes.set_yscale("log")
                axes.set_xticks(sorted({row[by] for row in rows}))
                axes.minorticks_off()
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_major_formatter("{x:g}")
            else:
                axes.set_ylim(bottom=0)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def draw(found: dict[str, Any]) -> dict[str, Figure]:
    """The pictures that a file has the points for, by name."""
    rows = found["rows"]
    about = f"{found['machine']}, {found['threads']} threads, torch {found['torch']}, {found['date']}"
    # older files lack the last two
    fixed = ["in_features", "out_features", "ranks", "run", "dropout", "params_fp32"]
    by_share = most(rows, [*fixed, "tokens"], "open")
    by_tokens = most(rows, [*fixed, "open"], "tokens")
    figures = {}
    if by_share:
        title = f"{by_share[0]['tokens']} tokens, {shape(by_share[0])}\n{about}"
        labels = ("share of gates that are open", "milliseconds")
        figures["open-share"] = panels(by_share, "open_share", times, labels, title)
    if by_tokens:
        title = f"{by_tokens[0]['open']:.0%} of gates open, {shape(by_tokens[0])}\n{about}"
        figures["tokens"] = panels(by_tokens, "tokens", times, ("tokens", "milliseconds"), title)
        labels = ("tokens", "% of the frozen layer's time")
        figures["overhead"] = panels(by_tokens, "tokens", over_frozen, labels, title)
    return figures


def main(results: str, out: str) -> None:
    """Draws into the folder `out`."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("pictures are drawn by matplotlib: pip install 'rode[plots]'") from None
    found = read(results)
    figures = draw(found)
    if not figures:
        raise SystemExit(
            f"{results}: nothing to draw: no shape was timed with two open shares or two numbers of tokens"
        )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("open-share", "tokens", "overhead"):
        if name not in figures:
            wanted = "open shares" if name == "open-share" else "numbers of tokens"
            print(f"{name}.svg: not drawn, for no shape was timed with two {wanted}")
            continue
        path, aside = folder / f"{name}.svg", folder / f"{name}.{os.getpid()}.tmp"
        with matplotlib.rc_context(SAVING):
            figures[name].savefig(aside, format="svg", metadata={"Date": None})
        aside.replace(path)
        print(path)
