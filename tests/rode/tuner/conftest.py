"""Models small enough to build in every test, and the formula written apart from the package."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn


class Mlp(nn.Module):
    """Two linear layers of different widths between inputs of 12 and outputs of 5 features."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.lin0 = nn.Linear(12, 9, dtype=dtype)
        self.act = nn.Tanh()
        self.lin1 = nn.Linear(9, 5, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin1(self.act(self.lin0(x)))


@pytest.fixture
def mlp():
    """A function that builds the same small float64 model every time."""

    def build(dtype: torch.dtype = torch.float64) -> Mlp:
        torch.manual_seed(0)
        return Mlp(dtype)

    return build


def _oracle_gates(x, router, bias, gate):
    """Gates of one token x (K,), one logit at a time."""
    n = len(router)
    h = [(router[i] * x).sum() + (0 if bias is None else bias[i]) for i in range(n)]
    if gate == "relu":
        return [v if v > 0 else torch.zeros_like(v) for v in h]
    total = sum(torch.exp(v) for v in h)
    soft = [torch.exp(v) / total for v in h]
    if gate == "softmax":
        return soft
    best = max(range(n), key=lambda i: h[i].item())
    return [v if i == best else torch.zeros_like(v) for i, v in enumerate(soft)]


@pytest.fixture
def oracle():
    """y = W x + b + sum_i s_i g_i(x) B_i A_i x, token by token and expert by expert, differentiable."""

    def run(x, weight, bias, A, B, router, router_bias, ranks, scaling, gate):
        rows = []
        for token in x.reshape(-1, x.shape[-1]):
            y = weight @ token + bias
            gates = [1.0] * len(ranks) if gate == "none" else _oracle_gates(token, router, router_bias, gate)
            start = 0
            for i, rank in enumerate(ranks):
                part = slice(start, start + rank)
                y = y + scaling[i] * gates[i] * (B[:, part] @ (A[part] @ token))
                start += rank
            rows.append(y)
        return torch.stack(rows).reshape(*x.shape[:-1], len(weight))

    return run


SCALINGS = {
    "alpha/r": lambda ranks, alpha: [alpha / r for r in ranks],
    "alpha/sqrt(r)": lambda ranks, alpha: [alpha / math.sqrt(r) for r in ranks],
    "alpha/sum r": lambda ranks, alpha: [alpha / sum(ranks) for _ in ranks],
    "1/r": lambda ranks, alpha: [1 / r for r in ranks],
}


@pytest.fixture(params=SCALINGS)
def scaling(request):
    """Name of a scaling, and the function that says what it means."""
    return request.param, SCALINGS[request.param]
