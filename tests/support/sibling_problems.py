"""Siblings: problems of `mixture_oracle` that share x, what they should give, and the operation on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mixture_oracle import (
    Problem,
    Result,
    assert_as_accurate_as_eager,
    eager,
    oracle,
    random_problem,
    typical,
)
from rode_kernels.backends.reference import dropout_keep
from rode_kernels.mixture import make_mixture
from rode_kernels.siblings import Sibling, SiblingNeeds, mixtures_backward, mixtures_forward

PARAMETERS = ("A", "B", "router_weight", "router_bias")


@dataclass
class Found:
    ys: list[Tensor]
    us: list[Tensor]
    gs: list[Tensor]
    dx: Tensor | None
    grads: list[dict[str, Tensor | None]]


def random_siblings(
    tokens=(17,), K=24, widths=(20, 36), ranks=((2, 4, 8, 16), (3, 9)), *, seed=0, **rest
) -> list[Problem]:
    """A problem for each of `widths`, all with the same x."""
    problems = [
        random_problem(tokens, K=K, O=O, ranks=r, seed=100 * seed + j, **rest)
        for j, (O, r) in enumerate(zip(widths, ranks, strict=True))
    ]
    return [replace(p, x=problems[0].x) for p in problems]


def with_dropout(problems: list[Problem], dropout_p: float, seeds: list[int]) -> list[Problem]:
    x = problems[0].x
    rows = x.numel() // x.shape[-1]
    keeps = {
        s: dropout_keep(torch.tensor([s]), dropout_p, rows, x.shape[-1]).view(x.shape) for s in set(seeds)
    }
    return [
        replace(p, keep=keeps[s], dropout_p=dropout_p, dropout_seed=s)
        for p, s in zip(problems, seeds, strict=True)
    ]


def siblings_of(problems: list[Problem]) -> list[Sibling]:
    seeds = {
        p.dropout_seed: torch.tensor([p.dropout_seed], device=p.x.device) for p in problems if p.dropout_p > 0
    }
    return [
        Sibling(
            *(p.A, p.B, p.router_weight, p.router_bias),
            make_mixture(p.ranks, p.scaling),
            seeds.get(p.dropout_seed),
        )
        for p in problems
    ]


def run(
    problems: list[Problem],
    backend: str,
    *,
    without_dy: tuple[int, ...] = (),
    need_x: bool = True,
    needs: list[SiblingNeeds] | None = None,
) -> Found:
    """Forward, in place where there is a base, and backward."""
    x, siblings, dropout_p = problems[0].x, siblings_of(problems), problems[0].dropout_p
    bases = [None if p.base is None else p.base.clone() for p in problems]
    outputs = mixtures_forward(x, siblings, bases, dropout_p=dropout_p, backend=backend)
    for (y, _, _), base in zip(outputs, bases, strict=True):
        assert base is None or y is base
    dx, grads = mixtures_backward(
        x,
        siblings,
        [(u, g) for _, u, g in outputs],
        [None if j in without_dy else p.dy for j, p in enumerate(problems)],
        dgates=[p.dgates for p in problems],
        need_x=need_x,
        needs=needs,
        dropout_p=dropout_p,
        backend=backend,
    )
    ys, us, gs = (list(t) for t in zip(*outputs, strict=True))
    return Found(ys, us, gs, dx, [{n: getattr(g, n) for n in PARAMETERS} for g in grads])


def check(problems: list[Problem], backend: str, *, without_dy: tuple[int, ...] = ()) -> Found:
    """Values and all gradients against float64, at most twice as far from it as plain PyTorch."""
    found, dtype = run(problems, backend, without_dy=without_dy), problems[0].x.dtype
    of_x: list[list[Tensor]] = []
    for j, p in enumerate(problems):
        gates = found.gs[j].view(*p.x.shape[:-1], -1)
        if j in without_dy:
            p = replace(p, dy=torch.zeros_like(p.dy))
        ways: list[Result] = [f(p, gates > 0) for f in (oracle, eager, typical)]
        truth, plain, terms = ways
        compare = assert_as_accurate_as_eager
        compare(found.ys[j], plain.y, truth.y, terms.y, f"y[{j}]", dtype)
        compare(gates, plain.gates, truth.gates, terms.gates, f"gates[{j}]", dtype)
        for name, grad in found.grads[j].items():
            if getattr(p, name) is None:
                assert grad is None
                continue
            assert grad is not None
            in_dtype = found.gs[j].dtype if name == "router_bias" else getattr(p, name).dtype
            assert grad.dtype == in_dtype, f"{name}[{j}]: gradient in {grad.dtype}"
            pieces = (plain.grads[name], truth.grads[name], terms.grads[name])
            compare(grad, *pieces, f"gradient of {name}[{j}]", dtype)
        of_x.append([w.grads["x"] for w in ways])
    truth, plain, terms = (sum(t[1:], start=t[0]) for t in zip(*of_x, strict=True))
    squares = sum(t[2].square() for t in of_x).sqrt()
    assert found.dx is not None
    assert_as_accurate_as_eager(found.dx, plain, truth, squares, "gradient of x", dtype)
    return found
