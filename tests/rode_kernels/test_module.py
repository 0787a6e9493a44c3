"""RectifiedMixture: the operation with its parameters."""

from __future__ import annotations

import torch

from mixture_oracle import Problem, oracle
from rode_kernels import RectifiedMixture


def test_starts_as_no_change_with_about_half_of_the_gates_open():
    torch.manual_seed(0)
    layer = RectifiedMixture(64, 32, (2, 4, 8, 16))
    x, base = torch.randn(500, 64), torch.randn(500, 32)
    assert torch.equal(layer(x, base), base)
    assert 0.4 < ((x @ layer.router_weight.t()) > 0).float().mean() < 0.6


def test_is_the_formula_and_trains():
    torch.manual_seed(0)
    layer = RectifiedMixture(12, 9, (1, 3), alpha=5.0, router_bias=True)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(4, 7, 12)
    p = Problem(
        x=x,
        A=layer.A.detach(),
        B=layer.B.detach(),
        ranks=(1, 3),
        scaling=(5.0, 5.0 / 3),
        router_weight=layer.router_weight.detach(),
        router_bias=layer.router_bias.detach(),
        dy=torch.ones(4, 7, 9),
    )
    y = layer(x)
    truth = oracle(p)
    torch.testing.assert_close(y.double(), truth.y, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    for name in ("A", "B", "router_weight", "router_bias"):
        torch.testing.assert_close(
            getattr(layer, name).grad.double(), truth.grads[name], rtol=1e-4, atol=1e-4
        )


def test_dropout_only_in_training():
    layer = RectifiedMixture(12, 9, (2,), dropout=0.5)
    torch.nn.init.normal_(layer.B)
    x = torch.randn(40, 12)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    assert "ranks=(2,)" in repr(layer)
