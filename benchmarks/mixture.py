"""Times the operation against plain PyTorch, the frozen layer beside it and the machine's roofline: forward, backward, both.

Each form's result is checked first. Calls take one copy of the tensors after the other, so that none finds an earlier call's in
cache; rounds are interleaved in one process; ratios are taken round by round. Before a backward pass alone the cache is
overwritten, for the forward pass has just filled it. On a GPU device events time each call, its L2 overwritten.
docs/benchmarks.md says how to read it.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import write_json
from benchmarks.cases import ON_CPU, ON_GPU, chosen
from benchmarks.peak import Peak, compiler, measure
from benchmarks.problem import (
    Form,
    Problem,
    best_backend,
    check,
    device_of,
    enough,
    forms,
    gradients_in_place,
    results,
    trained,
)
from benchmarks.timing import (
    Spread,
    clock,
    dtype_name,
    headline,
    interleaved,
    machine,
    ratios,
    spread,
)
from benchmarks.work import work
from rode_kernels import backends

COMPILED = "compiled "
TRAINING = {"backward", "both", "both in place"}
IN_PLACE = {"in place", "both in place"}
TITLES = (
    f"{'case':16} {'dtype':9} {'open':>6} {'pass':13} {'backend':8} {'milliseconds':>28} {'packed':>22} {'loop':>22} "
    f"{'compiled':>41} {'of frozen':>10} {'roofline':>14}"
)


def frozen(p: Problem) -> tuple[Form, Form]:
    """The layer beside which the mixture stands, y = W0 x, and the gradient of x alone; W0 is another one in each call too. The
    second stands beside calls in place: it is handed their base, and leaves it alone."""
    K, O, like = p.x.shape[1], p.base.shape[1], dict(dtype=p.x.dtype, device=p.x.device)
    count = enough(O * K * p.x.element_size(), p.x.device.type)
    weights = cycle([torch.randn(O, K, **like) for _ in range(count)])

    def linear(x: torch.Tensor, _base: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, next(weights))

    return Form(lambda q: [q.x], linear), Form(lambda q: [q.x, q.base], linear, linear)


def calls(what: str, all_forms: dict[str, Form], copies: list[Problem]) -> dict[str, Callable[[], Any]]:
    """For each form that has this pass, a function that returns the next call of it, on the next of the copies."""
    train = what in TRAINING
    if what in IN_PLACE:
        all_forms = {name: form for name, form in all_forms.items() if form.run_in_place is not None}
    taken: Iterator[tuple[Problem, dict[str, list]]] = cycle(
        [
            (q, {n: trained(f.leaves(q)) if train else f.leaves(q) for n, f in all_forms.items()})
            for q in copies
        ]
    )

    def of(name: str, form: Form) -> Callable[[], Callable[[], Any]]:
        def following() -> Callable[[], Any]:
            q, by_form = next(taken)
            leaves = by_form[name]
            if what == "backward":
                y = form.run(*leaves)
                return lambda: torch.autograd.grad(y, leaves, q.dy)
            if what == "both":
                return lambda: torch.autograd.grad(form.run(*leaves), leaves, q.dy)
            if what == "both in place":
                return lambda: gradients_in_place(form, leaves, q.dy)
            run = form.run if what == "forward" else form.run_in_place
            return lambda: run(*leaves)

        return following

    return {name: of(name, form) for name, form in all_forms.items()}


def timed(
    what: str,
    all_forms: dict[str, Form],
    copies: list[Problem],
    rounds: int,
    host: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    device, of_cache = copies[0].x.device.type, what == "backward"
    with torch.set_grad_enabled(what in TRAINING):
        return interleaved(
            calls(what, all_forms, copies), rounds, device, prepared=True, flush=of_cache, host=host
        )


def compile_forms(
    p: Problem, plain: dict[str, Form], train: bool
) -> tuple[dict[str, Form], dict[str, float]]:
    """The plain forms compiled, and the seconds that their first calls took."""
    torch.compiler.reset()  # what other cases compiled counts towards a limit
    compiled, took = {}, {}
    for name, form in plain.items():
        compiled[COMPILED + name] = form = form.compiled()
        start = time.perf_counter()
        results(p, form, train)
        took[name] = time.perf_counter() - start
    return compiled, took


def run_case(
    p: Problem, names: list[str], passes: list[str], rounds: int, compile_too: bool, peak: Peak | None
) -> list[dict[str, Any]]:
    """A row for each pass and backend."""
    all_forms, took, rows = forms(p, names), {}, []
    train = not TRAINING.isdisjoint(passes)
    if compile_too:
        plain = {name: form for name, form in all_forms.items() if name not in names}
        compiled, took = compile_forms(p, plain, train)
        all_forms |= compiled
    check(p, all_forms, train)
    own, (beside, beside_in_place) = {n: all_forms[n] for n in names}, frozen(p)
    copies, device = p.copies(), p.x.device.type
    sizes = p.x.element_size(), p.A.element_size()
    needed = work(p.is_open, p.ranks, p.x.shape[1], p.base.shape[1], *sizes)
    for what in passes:
        host: dict[str, float] = {}
        times = timed(what, all_forms, copies, rounds, host)
        # in rounds of its own, fewer: it takes many times as long, and all that is wanted is one ratio
        other = beside_in_place if what in IN_PLACE else beside
        of_frozen = timed(what, {**own, "frozen": other}, copies, max(3, rounds // 4), {})
        fastest = min(
            (n for n in times if n.startswith(COMPILED)), key=lambda n: spread(times[n]).median, default=None
        )
        for name in names:
            median = spread(times[name]).median
            against = {n: ratios(times, n, name)._asdict() for n in ("packed", "loop") if n in times}
            against |= {n: ratios(times, n, name)._asdict() for n in times if n.startswith(COMPILED)}
            if fastest:
                against["compiled"] = against[fastest]
            roofline = None
            if peak is not None:
                floor, bound = peak.floor(needed[what], p.x.dtype)
                roofline = {**vars(needed[what]), "seconds": floor, "bound": bound, "share": floor / median}
            rows.append(
                {
                    "pass": what,
                    "backend": name,
                    "seconds": {
                        n: spread(t)._asdict() for n, t in times.items() if n == name or n not in names
                    },
                    "ratio": against,
                    "fastest_compiled": fastest and fastest.removeprefix(COMPILED),
                    "compile_seconds": took,
                    "frozen_seconds": spread(of_frozen["frozen"])._asdict(),
                    "of_frozen": ratios(of_frozen, name, "frozen")._asdict(),
                    "roofline": roofline,
                    "host_seconds": host,  # in which the host asks a GPU for it
                    "clock_mhz": clock(device),  # right after the last round
                }
            )
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""

    def ratio(name: str) -> str:
        return str(Spread(**row["ratio"][name])) if name in row["ratio"] else "-"

    compiled = ratio("compiled") + (f" {row['fastest_compiled']}" if row["fastest_compiled"] else "")
    for name, of in row["ratio"].items():  # the slower one too, for loop's column is to be compared with it
        if name.startswith(COMPILED) and name != COMPILED + (row["fastest_compiled"] or ""):
            compiled += f", {of['median']:.2f} {name.removeprefix(COMPILED)}"
    roofline = row["roofline"]
    share = "-" if roofline is None else f"{roofline['share']:.0%} {roofline['bound']}"
    own = row["seconds"][row["backend"]]
    milliseconds = Spread(**{name: 1000 * value for name, value in own.items()}).text(3)
    host = f"  host {1e6 * row['host_seconds'][row['backend']]:.0f} us" if row["host_seconds"] else ""
    return (
        f"{row['case']:16} {row['dtype']:9} {row['open_share']:6.1%} {row['pass']:13} {row['backend']:8} {milliseconds:>28} "
        f"{ratio('packed'):>22} {ratio('loop'):>22} {compiled:>41} {row['of_frozen']['median']:10.1%} {share:>14}{host}"
    )


def main(options: Namespace) -> None:
    """`options` as `python -m benchmarks mixture` has them."""
    names = options.backend or [best_backend()]
    places = {name: device_of(name) for name in names}
    on_gpu = names[0] != "cpu"
    if any((name != "cpu") != on_gpu for name in names):
        raise SystemExit("--backend: one run is on one device; run cpu apart from cuda and triton")
    shapes = chosen(ON_GPU if on_gpu else ON_CPU, options.cases)
    missing = [name for name in names if places[name] is None]
    if missing:
        for name in missing:
            print(f"{name} cannot run here: {backends()[name].reason}")
        print("On a machine where it can, this would run")
        for case, s in shapes.items():
            print(
                f"  {case}: M = {s.tokens}, K = {s.in_features}, O = {s.out_features}, ranks {s.ranks}, runs of {s.run}, "
                f"open {', '.join(f'{share:.0%}' for share in s.open)}, dropout {s.dropout}, parameters in "
                f"{'float32' if s.params_fp32 else 'the dtype of x'}"
            )
        print(f"in {', '.join(options.dtype)}: {', '.join(options.passes)}; results checked first")
        return
    device = places[names[0]]
    about = {"benchmark": "mixture", **machine(device), "rounds": options.rounds}
    about["backends"] = {name: backends()[name].reason for name in names}
    print(f"{headline(about)}; {'; '.join(f'{name}: {why}' for name, why in about['backends'].items())}")
    peak, compile_too = measure(device), options.compile
    print(
        peak
        or "roofline: not known, for no C++ compiler is here to measure it (g++, clang++, or name one in CXX)"
    )
    if compile_too and device == "cpu" and compiler() is None:
        compile_too = False
        print("compiled: left out, for torch.compile needs a C++ compiler on a CPU")
    print(
        "packed, loop, compiled: how many times as long as the operation they take. docs/benchmarks.md explains each column."
    )
    print(f"\n{TITLES}")
    about["peak"] = peak and peak.json()
    rows: list[dict[str, Any]] = []
    for case, s in shapes.items():
        for dtype in (getattr(torch, name) for name in options.dtype):
            for share in options.open or s.open:
                p = Problem.random(*s[:3], dtype, device, s.ranks, share, s.run, s.dropout, s.params_fp32)
                known = {"case": case, **s._asdict(), "dtype": dtype_name(dtype)}
                known |= {"open": share, "open_share": p.open_share}
                for row in run_case(p, names, options.passes, options.rounds, compile_too, peak):
                    rows.append(known | row)
                    print(line(rows[-1]), flush=True)
                took = rows[-1]["compile_seconds"]
                if took:
                    each = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in took.items())
                    print(f"  (compiling, not in any time above: {each})", flush=True)
                if options.json:  # what was measured stays if a later case fails
                    write_json(options.json, {**about, "rows": rows})
