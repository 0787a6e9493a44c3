"""An analysis in words and tables, for the terminal and the page alike."""

from __future__ import annotations

from typing import Any

from rode_food.text_table import text_table

Rows = list[list[str]]  # the first one holds titles


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def fixed(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def open_rows(analysis: dict[str, Any]) -> Rows:
    """Open rate in percent, by task and kind of token."""
    kinds = analysis["kinds"]
    rows = [["open rate, %", *kinds]]
    return rows + [
        [task, *(percent(by_kind[kind]) for kind in kinds)]
        for task, by_kind in analysis["open_by_task"].items()
    ]


def best_measure(analysis: dict[str, Any]) -> str:
    """The use that tells tasks apart: open rates where the gates of every adapter close at all, else shares of the gates."""
    closes = [one["sparsity"]["all tasks"]["all"]["zeros"] > 0 for one in adapters(analysis)]
    return "open_rate" if all(closes) else "gate_share"


def sharing_rows(analysis: dict[str, Any], kind: str, measure: str) -> Rows:
    """For each pair of tasks their similarity beside its reference levels."""
    rows = [["shared", "of the two", "experts at random", "task at random", "p", "halves of one task"]]
    others = {}
    if analysis.get("against"):
        rows[0].append(f"of {analysis['against']['adapter']}")
        others = {(*e["tasks"], e["kind"], e["measure"]): e for e in analysis["against"]["sharing"]}
    for entry in analysis["sharing"]:
        if entry["kind"] == kind and entry["measure"] == measure:
            rows.append(
                [
                    " & ".join(entry["tasks"]),
                    fixed(entry["jaccard"]),
                    fixed(entry["unrelated"]["mean"]),
                    fixed(entry["same"]["mean"]),
                    f"{entry['p']:.3f}",
                    " ".join(fixed(entry["halves"][task]) for task in entry["tasks"]),
                ]
            )
            if analysis.get("against"):
                other = others.get((*entry["tasks"], kind, measure))
                rows[-1].append(fixed(other and other["jaccard"]))
    return rows


def adapters(analysis: dict[str, Any]) -> list[dict[str, Any]]:
    """The adapter, and the one that it is set against."""
    return [analysis] + ([analysis["against"]] if analysis.get("against") else [])


def sparsity_rows(analysis: dict[str, Any]) -> Rows:
    """How many experts a token uses, by kind of token."""
    rows = [["per token", "kind", "gates exactly 0, %", "none open, %", "effective experts", "carry 90 %"]]
    for one in adapters(analysis):
        for kind, s in one["sparsity"]["all tasks"].items():
            if s is not None:
                rows.append(
                    [
                        f"{one['adapter']} ({one['gate']})",
                        kind,
                        percent(s["zeros"]),
                        percent(s["closed"]),
                        f"{fixed(s['effective'])} of {s['experts']:g}",
                        fixed(s["carriers"]),
                    ]
                )
    return rows


def loss_rows(analysis: dict[str, Any]) -> Rows:
    """Loss per answer token."""
    rows = [["loss", *analysis["tasks"]]]
    return rows + [
        [f"{one['adapter']} ({one['gate']})", *(fixed(one["loss"].get(t)) for t in analysis["tasks"])]
        for one in adapters(analysis)
    ]


def unit_name(unit: dict[str, Any]) -> str:
    return f"{unit['layer']} expert {unit['expert']} (rank {unit['rank']})"


def counts(analysis: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(what, experts) of those that open never, hardly, always."""
    total = len(analysis["units"])
    named = (("dead", "dead"), ("nearly_dead", "open on under 1 %"), ("always_open", "always open"))
    return [
        (f"{what}: {len(analysis[key])} of {total} experts{of_ranks(analysis, key)}", analysis[key])
        for key, what in named
    ]


def of_ranks(analysis: dict[str, Any], key: str) -> str:
    """ ", by rank: 2: 5 of 64, ..." for experts under `key`."""
    if not analysis[key]:
        return ""
    ranks = sorted({unit["rank"] for unit in analysis["units"]})
    parts = [
        f"{rank}: {sum(u['rank'] == rank for u in analysis[key])} of {sum(u['rank'] == rank for u in analysis['units'])}"
        for rank in ranks
    ]
    return f" (by rank {', '.join(parts)})"


def format_analysis(analysis: dict[str, Any]) -> str:
    """The text for the terminal; sharing is shown for the answers' tokens only."""
    examples = ", ".join(f"{task} {count}" for task, count in analysis["examples"].items())
    experts = len(analysis["units"])
    parts = [
        f"{analysis['adapter']}: {analysis['gate']} gates, {experts} experts; held-out examples: {examples}",
        text_table(open_rows(analysis)),
    ]
    said = []
    for what, units in counts(analysis):
        said.append(what)
        if units and len(units) <= 10 and not what.startswith("always"):
            said += [f"  {unit_name(unit)}" for unit in units]
    parts.append("\n".join(said))
    measure = best_measure(analysis)
    rows = sharing_rows(analysis, "answer", measure)
    if len(rows) > 1:
        parts.append(
            f"similarity of use on answer tokens ({measure.replace('_', ' ')}; 1 is the same)\n{text_table(rows)}"
        )
    parts += [text_table(sparsity_rows(analysis)), text_table(loss_rows(analysis))]
    return "\n\n".join(parts)
