"""Differences between variants that a reviewer could accept: paired within seeds, drawn again over what was photographed.

A comparison is of one or more variants with one or more others, over the seeds that all of them have. Within each seed all
start alike and see the same pictures in the same order, and all answer the same questions, so each difference is taken
within the seed. The bootstrap draws seeds and groups of answers (objects; not photographs, of which one object has many)
again, independently of each other. It draws one fewer than there are of each: with n of n the variance of a mean comes out
(n - 1) / n too small, which matters with few seeds. Drawing both ways counts what is particular to one object in one seed
more than once, so the errors err to the large side (Owen, "The pigeonhole bootstrap", 2007).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rode.paper.answers import Answer
from rode.paper.tables import Comparison
from rode_food.metrics.sums import PMAE, metric_of

Array = npt.NDArray[np.float64]
Answers = Mapping[str, Mapping[int, Sequence[Answer]]]
"""Variant -> seed -> answers."""
ROUNDS = 4000
LEVEL, POWER = 0.05, 0.8


@dataclass(frozen=True)
class Difference:
    """One metric of one comparison.

    Attributes:
        comparison, metric: names.
        first, second: means over seeds of the two sides, in percent.
        by_seed: first - second, in the order of the seeds.
        error: standard error, over seeds and groups drawn again.
        low, high: 95 % interval: the mean of the differences -+ a quantile of t with seeds - 1 degrees of freedom x error.
        p: two-sided, from the same t.
        p_holm: p after Holm's correction over all differences of the report.
        effect: mean over standard deviation of the differences by seed (Cohen's d of pairs); None where they do not vary.
        detectable: the smallest true difference that this design finds with 80 % at the 5 % level, uncorrected.
        detectable_holm: the same at the strictest level of Holm's correction.
        groups: how many were drawn from.
    """

    comparison: str
    metric: str
    first: float
    second: float
    by_seed: tuple[float, ...]
    error: float
    low: float
    high: float
    p: float
    p_holm: float
    effect: float | None
    detectable: float
    detectable_holm: float
    groups: int

    @property
    def mean(self) -> float:
        return self.first - self.second


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: adjusted p-values in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    out, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        out[index] = largest
    return out


def detectable(error: float, freedom: int, level: float = LEVEL, power: float = POWER) -> float:
    """The smallest true difference that a two-sided t-test at `level` finds with probability `power`.

    Args:
        error: standard error of the estimate.
        freedom: degrees of freedom of the test.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    if error == 0:
        return 0.0
    limit = t.ppf(1 - level / 2, freedom)

    def lacking(shift: float) -> float:
        # scipy gives NaN for some tails that are next to nothing
        tails = (float(nct.sf(limit, freedom, side)) for side in (shift, -shift))
        return sum(tail for tail in tails if tail == tail) - power

    end = 1.0
    while lacking(end) < 0:
        end *= 1.5
    return error * float(brentq(lacking, 0.0, end))


class Measured:
    """One metric of every variant and seed, as sums by group.

    Args:
        metric: a name that `rode_food.metrics.sums.metric_of` knows.
        answers: variant -> seed -> answers.
        seeds: those to take; each variant has them.

    Raises:
        ValueError: runs answered different questions, or none that this metric scores.
    """

    def __init__(self, metric: str, answers: Answers, seeds: Sequence[int]) -> None:
        self.metric, self.parts = metric, PMAE if metric == "pmae" else (metric,)
        self.seeds, self.variants = list(seeds), list(answers)
        self.groups: list[tuple[str, str]] = []
        asked: list[tuple[str, str]] | None = None
        tables: list[list[Array]] = []
        for variant in self.variants:
            tables.append([])
            for seed in self.seeds:
                scored = [a for a in answers[variant][seed] if self.parts[0] in a.sums]
                mine = sorted((a.source, a.record) for a in scored)
                if asked is None:
                    asked = mine
                    self.groups = sorted({(a.source, a.group) for a in scored})
                if not mine or mine != asked:
                    raise ValueError(
                        f"{metric}: expected answers to the same questions from all runs, got others from {variant} seed {seed}"
                    )
                place = {group: i for i, group in enumerate(self.groups)}
                width = len(scored[0].sums[self.parts[0]])
                table = np.zeros((len(self.groups), len(self.parts), width))
                for a in scored:
                    table[place[a.source, a.group]] += [a.sums[part] for part in self.parts]
                tables[-1].append(table)
        self.sums = np.array(tables)  # (variants, seeds, groups, parts, numbers of a part)

    def values(self, weights: Array) -> Array:
        """(variants, seeds, draws): the metric where each group counts so many times.

        Args:
            weights: (draws, groups).
        """
        sums = np.einsum("bg,vsgpk->vsbpk", weights, self.sums, optimize=True)
        if self.metric == "sacrebleu":
            flat = sums.reshape(-1, sums.shape[-1])
            found = [metric_of("sacrebleu", {"sacrebleu": row.tolist()}) for row in flat]
            return np.array(found, dtype=np.float64).reshape(sums.shape[:3])
        ratios: Array = 100 * sums[..., 0] / sums[..., 1]
        return ratios.mean(-1)


def _draws(count: int, rounds: int, rng: np.random.Generator) -> Array:
    """(rounds, count): how often each of `count` comes up in count - 1 draws."""
    return rng.multinomial(max(1, count - 1), np.full(count, 1 / count), size=rounds).astype(np.float64)


def _variants_of(comparisons: Iterable[Comparison]) -> list[str]:
    return list(dict.fromkeys(v for pair in comparisons for side in (pair.first, pair.second) for v in side))


def compare(
    comparisons: Mapping[str, Comparison],
    metrics: Sequence[str],
    answers: Answers,
    *,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> list[Difference]:
    """Every comparison in its metrics, with Holm's correction over all of them.

    Args:
        comparisons: by name.
        metrics: names; a comparison with metrics of its own is made in those alone.
        answers: variant -> seed -> answers, for all variants that are compared.
        rounds: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: fewer than two seeds are common to all, or `Measured`'s.
        ImportError: scipy is not installed.
    """
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError("intervals need scipy: pip install 'rode[statistics]'") from error
    wanted = _variants_of(comparisons.values())
    seeds = sorted(set.intersection(*(set(answers[variant]) for variant in wanted)))
    if len(seeds) < 2:
        raise ValueError(f"expected two seeds or more that all of {', '.join(wanted)} have, got {len(seeds)}")
    freedom = len(seeds) - 1
    quantile = float(t.ppf(1 - LEVEL / 2, freedom))
    found: list[dict[str, Any]] = []
    made = {
        metric: {n: c for n, c in comparisons.items() if metric in (c.metrics or metrics)}
        for metric in metrics
    }
    number = sum(map(len, made.values()))
    for metric, mine in made.items():
        if not mine:
            continue
        wanted = _variants_of(mine.values())
        measured = Measured(metric, {variant: answers[variant] for variant in wanted}, seeds)
        rng = np.random.default_rng(seed)
        groups = len(measured.groups)
        as_found = measured.values(np.ones((1, groups)))[..., 0]  # (variants, seeds)
        drawn = measured.values(_draws(groups, rounds, rng))  # (variants, seeds, rounds)
        seed_weights = _draws(len(seeds), rounds, rng) / (len(seeds) - 1)
        for name, pair in mine.items():
            sides = [[wanted.index(variant) for variant in side] for side in (pair.first, pair.second)]
            means = [as_found[side].mean(0) for side in sides]
            by_seed = means[0] - means[1]
            differences = drawn[sides[0]].mean(0) - drawn[sides[1]].mean(0)  # (seeds, rounds)
            deviation = float((differences * seed_weights.T).sum(0).std(ddof=1))
            mean, spread = float(by_seed.mean()), float(by_seed.std(ddof=1))
            ratio = mean / deviation if deviation else (0.0 if mean == 0 else np.inf)
            found.append(
                {
                    "comparison": name,
                    "metric": metric,
                    "first": float(means[0].mean()),
                    "second": float(means[1].mean()),
                    "by_seed": tuple(by_seed.tolist()),
                    "error": deviation,
                    "low": mean - quantile * deviation,
                    "high": mean + quantile * deviation,
                    "p": float(2 * t.sf(abs(ratio), freedom)),
                    "effect": mean / spread if spread else None,
                    "detectable": detectable(deviation, freedom),
                    "detectable_holm": detectable(deviation, freedom, LEVEL / number),
                    "groups": groups,
                }
            )
    corrected = holm([entry["p"] for entry in found])
    return [Difference(**entry, p_holm=p) for entry, p in zip(found, corrected, strict=True)]
