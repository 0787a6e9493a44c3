"""From sums over examples to the numbers of an analysis: plain values, ready for JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from rode.evaluation.analysis.measure import TaskGates
from rode.evaluation.analysis.sharing import Usage, halves, share

NEARLY_DEAD = 0.01
"""Open on fewer tokens than this of every kind in every task."""
VALUES = {"open_rate": "open", "gate_share": "gates"}
"""Measures of use: share of tokens with an open gate; share of the layer's summed gates."""

Analysis = dict[str, Any]


class _Sums:
    """One task's sums, the experts of all layers side by side: E examples, K kinds ("all" last), L layers, U experts."""

    def __init__(self, measured: TaskGates) -> None:
        layers = measured.layers
        self.ids = measured.ids
        self.kinds = (*layers[0].kinds, "all")
        self.layers = torch.tensor([n for n, layer in enumerate(layers) for _ in layer.ranks])  # (U,)
        self.tokens = _with_all(torch.stack([layer.tokens for layer in layers], -1))  # (E, K, L)
        self.open = _with_all(torch.cat([layer.open for layer in layers], -1))  # (E, K, U)
        self.gates = _with_all(torch.cat([layer.gates for layer in layers], -1))  # (E, K, U)
        # (K, 5): tokens, gates, and what `ExampleGates` sums, over examples and layers
        self.mixing = {
            name: _with_all(reduce(torch.add, (getattr(layer, name) for layer in layers))).sum(0)
            for name in ("tokens", "zeros", "effective", "carriers", "closed")
        }
        gates = reduce(torch.add, (layer.tokens * len(layer.ranks) for layer in layers))
        self.mixing["gates"] = _with_all(gates).sum(0)

    def mean(self, value: str) -> Tensor:
        """(K, U) open rates or mean gates over all tokens of a kind; NaN where there were none."""
        return getattr(self, value).sum(0) / self.tokens.sum(0)[:, self.layers]

    def usage(self, value: str, kind: int) -> Usage:
        numerators = getattr(self, value)[:, kind]
        if value == "open":
            return Usage(self.ids, numerators, self.tokens[:, kind][:, self.layers])
        total = numerators.new_zeros(len(self.ids), int(self.layers[-1]) + 1)
        return Usage(self.ids, numerators, total.index_add(1, self.layers, numerators)[:, self.layers])


def _with_all(sums: Tensor) -> Tensor:
    return torch.cat((sums, sums.sum(1, keepdim=True)), dim=1)


def summarise(measured: Mapping[str, TaskGates], seed: int = 0) -> Analysis:
    """All numbers about one adapter.

    Args:
        measured: of `rode.evaluation.analysis.measure`. seed: of the reference levels of sharing.

    Returns:
        tasks, kinds; examples and loss by task; units: layer, block, expert and rank of each expert; open_rate and mean_gate: by
        task and kind a number for each unit; open_by_task: their mean over units; heat_maps: by stack of blocks; dead,
        nearly_dead, always_open: units; sharing: for each pair of tasks, kind and measure
        (`rode.evaluation.analysis.sharing.share`); sparsity: by kind, over all tasks, and by task. None stands where no
        token was seen.
    """
    sums = {task: _Sums(gates) for task, gates in measured.items()}
    first = next(iter(measured.values()))
    units = [
        {"layer": layer.name, "block": layer.block, "expert": expert, "rank": rank}
        for layer in first.layers
        for expert, rank in enumerate(layer.ranks)
    ]
    kinds = next(iter(sums.values())).kinds
    means = {
        name: {
            task: {kind: _plain(row) for kind, row in zip(kinds, s.mean(value), strict=True)}
            for task, s in sums.items()
        }
        for name, value in (("open_rate", "open"), ("mean_gate", "gates"))
    }
    rates = torch.cat([s.mean("open") for s in sums.values()])  # (tasks * kinds, U)
    most = rates.nan_to_num(nan=-1.0).max(0).values
    least = rates.nan_to_num(nan=2.0).min(0).values

    def listed(chosen: Tensor) -> list[dict[str, Any]]:
        return [{**units[i], "open_rate": most[i].item()} for i in chosen.nonzero()[:, 0].tolist()]

    return {
        "tasks": list(sums),
        "kinds": list(kinds),
        "examples": {task: len(gates.ids) for task, gates in measured.items()},
        "loss": {task: gates.loss for task, gates in measured.items()},
        "units": units,
        **means,
        "open_by_task": {
            task: {kind: _mean(row) for kind, row in by_kind.items()}
            for task, by_kind in means["open_rate"].items()
        },
        "heat_maps": _heat_maps(units, means),
        "dead": listed(most == 0),
        "nearly_dead": listed((most > 0) & (most < NEARLY_DEAD)),
        "always_open": listed(least == 1),
        "sharing": _sharing(sums, seed),
        "sparsity": {"all tasks": _sparsity(*sums.values()), **{t: _sparsity(s) for t, s in sums.items()}},
    }


def _plain(row: Tensor) -> list[float | None]:
    return [None if math.isnan(value) else value for value in row.tolist()]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _heat_maps(units: list[dict[str, Any]], means: dict[str, Any]) -> list[dict[str, Any]]:
    """For each list of blocks (a model's, a tower's): rows of blocks, columns of experts, means over a block's layers."""
    stacks: dict[str, dict[int, dict[int, list[int]]]] = {}
    for index, unit in enumerate(units):
        if unit["block"] is not None:
            stack = unit["layer"].partition(f".{unit['block']}.")[0]
            cells = stacks.setdefault(stack, {}).setdefault(unit["block"], {})
            cells.setdefault(unit["expert"], []).append(index)
    maps = []
    for stack, blocks in stacks.items():
        width = 1 + max(expert for cells in blocks.values() for expert in cells)
        ranks = [
            {u["rank"] for u in units if u["layer"].startswith(stack) and u["expert"] == e}
            for e in range(width)
        ]

        def rows(values: list[float | None], blocks: Any = blocks, width: int = width) -> list[Any]:
            return [
                [_mean([values[i] for i in blocks[block].get(e, [])]) for e in range(width)]
                for block in sorted(blocks)
            ]

        maps.append(
            {
                "stack": stack,
                "blocks": sorted(blocks),
                # None where layers differ
                "ranks": [next(iter(found)) if len(found) == 1 else None for found in ranks],
                **{
                    value: {
                        task: {kind: rows(row) for kind, row in by_kind.items()}
                        for task, by_kind in by_task.items()
                    }
                    for value, by_task in means.items()
                },
            }
        )
    return maps


def _sharing(sums: dict[str, _Sums], seed: int) -> list[dict[str, Any]]:
    found = []
    kinds = next(iter(sums.values())).kinds
    for name, value in VALUES.items():
        for k, kind in enumerate(kinds):
            usage = {task: s.usage(value, k) for task, s in sums.items() if s.tokens[:, k].sum() > 0}
            # each reference level has draws of its own, so that one more task leaves the others' numbers as they were
            within = {task: halves(u, torch.Generator().manual_seed(seed)) for task, u in usage.items()}
            for a, b in combinations(usage, 2):
                layers = sums[a].layers
                result = share(usage[a], usage[b], layers, torch.Generator().manual_seed(seed))
                if math.isnan(result["jaccard"]):  # neither task opens anything
                    continue
                found.append(
                    {
                        "tasks": [a, b],
                        "kind": kind,
                        "measure": name,
                        "halves": {task: within[task] for task in (a, b)},
                        **result,
                    }
                )
    return found


def _sparsity(*sums: _Sums) -> dict[str, dict[str, float] | None]:
    """Numbers by kind.

    zeros: the share of gates that are exactly 0; closed: of tokens with no open gate. Over the tokens that have one: the mean
    effective number of experts and the mean number that carries 90 % of the gates.
    """
    out: dict[str, dict[str, float] | None] = {}
    for k, kind in enumerate(sums[0].kinds):
        total = {name: sum(s.mixing[name][k].item() for s in sums) for name in sums[0].mixing}
        opened = total["tokens"] - total["closed"]
        out[kind] = None
        if total["tokens"]:
            out[kind] = {
                "experts": total["gates"] / total["tokens"],
                "zeros": total["zeros"] / total["gates"],
                "closed": total["closed"] / total["tokens"],
                "effective": total["effective"] / opened if opened else 0.0,
                "carriers": total["carriers"] / opened if opened else 0.0,
            }
    return out
