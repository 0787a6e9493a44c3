"""Bad input: one error that names the argument, what it got and what was wanted, before native code runs."""

from __future__ import annotations

import pytest
import torch

from mixture_oracle import random_problem
from rode_kernels import RectifiedMixture, gated_mixture, rectified_mixture


def call(router=True, **changes):
    p = random_problem((5,), router=router)
    args = {"x": p.x, "A": p.A, "B": p.B, "ranks": p.ranks, "scaling": p.scaling, "base": p.base}
    if router:
        args |= {"router_weight": p.router_weight, "router_bias": p.router_bias}
    else:
        args |= {"gates": p.gates}
    args |= changes
    return (rectified_mixture if router else gated_mixture)(**args)


Z = torch.zeros
RECTIFIED = {
    "x is a list": (dict(x=[1.0]), TypeError, "x: expected a torch.Tensor, got list"),
    "x of integers": (dict(x=Z(5, 24, dtype=torch.int64)), TypeError, "x: expected one of .*got torch.int64"),
    "x of another width": (dict(x=Z(5, 23)), ValueError, r"A: expected shape .*\(30, 23\), got \(30, 24\)"),
    "x without dimensions": (dict(x=Z(())), ValueError, "x: expected shape"),
    "sparse A": (dict(A=Z(30, 24).to_sparse()), TypeError, "A: expected a strided tensor"),
    "A of another rank": (dict(A=Z(29, 24)), ValueError, r"A: expected shape .*\(30, 24\), got \(29, 24\)"),
    "B transposed": (dict(B=Z(30, 20)), ValueError, r"B: expected shape .*\(30, 30\), got \(30, 20\)"),
    "B of one dimension": (
        dict(B=Z(30)),
        ValueError,
        r"B: expected shape \(out_features, sum\(ranks\)\), got \(30,\)",
    ),
    "router of another count": (
        dict(router_weight=Z(3, 24)),
        ValueError,
        r"router_weight: .*\(4, 24\), got \(3, 24\)",
    ),
    "router is None": (
        dict(router_weight=None),
        TypeError,
        "router_weight: expected a torch.Tensor, got NoneType",
    ),
    "bias of another shape": (dict(router_bias=Z(4, 1)), ValueError, r"router_bias: .*\(4,\), got \(4, 1\)"),
    "A in another precision": (
        dict(A=Z(30, 24, dtype=torch.float64)),
        TypeError,
        "A: expected dtype torch.float32",
    ),
    "A in 16 bits, x in 32": (dict(A=Z(30, 24, dtype=torch.bfloat16)), TypeError, "A: .*got torch.bfloat16"),
    "A elsewhere": (dict(A=Z(30, 24, device="meta")), ValueError, "A: expected on cpu .*got meta"),
    "base of another shape": (dict(base=Z(5, 21)), ValueError, r"base: .*\(5, 20\), got \(5, 21\)"),
    "base of another dtype": (dict(base=Z(5, 20).half()), TypeError, "base: expected dtype torch.float32"),
    "no ranks": (dict(ranks=()), ValueError, "ranks: expected at least one"),
    "ranks is an int": (dict(ranks=30), TypeError, "ranks: expected a tuple"),
    "rank 0": (dict(ranks=(0, 4, 10, 16)), ValueError, r"ranks\[0\]: .*got 0"),
    "rank is a float": (dict(ranks=(2.0, 4, 8, 16)), TypeError, r"ranks\[0\]: expected an int, got 2.0"),
    "rank is a bool": (dict(ranks=(True, 4, 8, 16)), TypeError, r"ranks\[0\]: expected an int, got True"),
    "scaling too short": (dict(scaling=(1.0, 2.0)), ValueError, r"scaling: .*\(4\), got 2"),
    "scaling is a float": (dict(scaling=1.0), TypeError, "scaling: expected a tuple"),
    "scaling is not finite": (
        dict(scaling=(1.0, 2.0, float("nan"), 1.0)),
        ValueError,
        r"scaling\[2\]: .*finite",
    ),
    "scaling of strings": (dict(scaling=("1", 2.0, 3.0, 1.0)), TypeError, r"scaling\[0\]: expected a float"),
    "dropout above 1": (dict(dropout_p=1.5), ValueError, "dropout_p: .*got 1.5"),
    "dropout below 0": (dict(dropout_p=-0.1), ValueError, "dropout_p: .*got -0.1"),
    "dropout is nan": (dict(dropout_p=float("nan")), ValueError, "dropout_p: .*got nan"),
    "dropout is a string": (dict(dropout_p="0.1"), TypeError, "dropout_p: expected a float"),
    "seed is a float": (dict(seed=1.5, dropout_p=0.1), TypeError, "seed: expected an int"),
    "seed too large": (dict(seed=2**63, dropout_p=0.1), ValueError, "seed: .*64 signed bits"),
    "seed of two": (
        dict(seed=torch.tensor([1, 2]), dropout_p=0.1),
        ValueError,
        "seed: expected a one-element int64",
    ),
    "seed of floats": (
        dict(seed=torch.tensor([1.0]), dropout_p=0.1),
        ValueError,
        "seed: expected a one-element int64",
    ),
    "unknown backend": (
        dict(backend="mps"),
        ValueError,
        "backend: expected one of reference, cpu, cuda, triton, cuda-emulated, got 'mps'",
    ),
    "inplace without base": (dict(inplace=True, base=None), ValueError, "inplace=True: base is None"),
    "inplace on a leaf": (
        dict(inplace=True, base=Z(5, 20, requires_grad=True)),
        ValueError,
        "inplace=True: base is a leaf",
    ),
    "inplace on itself": (
        dict(inplace=True, base=Z(1, 20).expand(5, 20)),
        ValueError,
        "inplace=True: base overlaps",
    ),
    "inplace in another dtype": (dict(inplace=True, base=Z(5, 20).half()), TypeError, "base: expected dtype"),
}
GATED = {
    "gates of another count": (dict(gates=Z(5, 3)), ValueError, r"gates: .*\(5, 4\) .*got \(5, 3\)"),
    "gates of another token count": (dict(gates=Z(6, 4)), ValueError, r"gates: .*got \(6, 4\)"),
    "gates of too many dimensions": (dict(gates=Z(1, 5, 4)), ValueError, r"gates: .*got \(1, 5, 4\)"),
    "gates of integers": (
        dict(gates=Z(5, 4, dtype=torch.int32)),
        TypeError,
        "gates: expected a floating dtype",
    ),
    "gates is None": (dict(gates=None), TypeError, "gates: expected a torch.Tensor, got NoneType"),
    "unknown gate_grad": (
        dict(gate_grad="some"),
        ValueError,
        "gate_grad: expected 'open' or 'all', got 'some'",
    ),
}


@pytest.mark.parametrize("case", RECTIFIED)
def test_rectified_mixture_refuses(case):
    changes, error, message = RECTIFIED[case]
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.parametrize("case", GATED)
def test_gated_mixture_refuses(case):
    changes, error, message = GATED[case]
    with pytest.raises(error, match=message):
        call(router=False, **changes)


def test_inplace_into_x_is_refused():
    x = torch.randn(5, 24)
    with pytest.raises(ValueError, match="base shares memory with x"):
        call(x=x, B=Z(24, 30), base=x, inplace=True)


def test_rode_backend_is_read(monkeypatch):
    monkeypatch.setenv("RODE_BACKEND", "tpu")
    with pytest.raises(
        ValueError,
        match="RODE_BACKEND: expected one of reference, cpu, cuda, triton, cuda-emulated, got 'tpu'",
    ):
        call()
    monkeypatch.setenv("RODE_BACKEND", "reference")
    assert call().shape == (5, 20)
    with pytest.raises(ValueError, match="backend: expected one of"):
        call(backend="tpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(in_features=0), "in_features: expected a positive int, got 0"),
        (dict(out_features=2.5), "out_features: expected a positive int, got 2.5"),
        (dict(ranks=(0,)), r"ranks\[0\]"),
        (dict(alpha=float("inf")), r"scaling\[0\]: expected a finite float"),
        (dict(dropout=2.0), "dropout: expected a probability"),
    ],
)
def test_module_refuses(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RectifiedMixture(**({"in_features": 4, "out_features": 4, "ranks": (2,)} | changes))
