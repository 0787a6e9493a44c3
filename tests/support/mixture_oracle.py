"""The formula of the paper, written apart from the package: a loop over experts, gradients by autograd.

`oracle` evaluates it in float64; `eager` is what a user of plain PyTorch would write in the dtype of x, and sets the tolerance:
`assert_as_accurate_as_eager` allows twice its error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from rode_kernels import gated_mixture, rectified_linear, rectified_mixture

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Of x, and of the parameters; None for the same.
MIXED = [(d, None) for d in DTYPES] + [(torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
ON_GPUS = ("cuda-emulated", "triton")  # what runs the code of GPU backends, which refuse float64


@dataclass
class Problem:
    x: Tensor  # (..., K)
    A: Tensor  # (R, K)
    B: Tensor  # (O, R)
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    router_weight: Tensor | None = None  # (N, K)
    router_bias: Tensor | None = None  # (N,)
    gates: Tensor | None = None  # (..., N)
    base: Tensor | None = None  # (..., O)
    dy: Tensor | None = None  # (..., O)
    dgates: Tensor | None = None  # (..., N)
    keep: Tensor | None = None  # (..., K) bool, with dropout
    dropout_p: float = 0.0
    dropout_seed: int | None = None
    gate_grad: str = "open"
    weight: Tensor | None = None  # (O, K), of the linear layer whose output is base
    bias: Tensor | None = None  # (O,)

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("x", "A", "B", "router_weight", "router_bias", "gates", "base", "weight", "bias")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


@dataclass
class Result:
    y: Tensor
    gates: Tensor | None
    grads: dict[str, Tensor] = field(default_factory=dict)


def random_problem(
    tokens=(17,),
    K=24,
    O=20,
    ranks=(2, 4, 8, 16),
    *,
    dtype=torch.float32,
    parameter_dtype=None,
    router=True,
    bias=True,
    base=True,
    open_share=0.5,
    seed=0,
    dgates=True,
    linear=False,
    **rest,
) -> Problem:
    """A random problem, with `linear` one of `rectified_linear`; `open_share` of (token, expert) pairs is open (through the
    router's bias, or as given gates)."""
    generator = torch.Generator().manual_seed(seed)
    N, R = len(ranks), sum(ranks)
    parameter_dtype = parameter_dtype or dtype

    def normal(*shape, std=1.0, dtype=dtype):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * std).to(dtype)

    problem = Problem(
        x=normal(*tokens, K),
        A=normal(R, K, std=K**-0.5, dtype=parameter_dtype),
        B=normal(O, R, dtype=parameter_dtype),
        ranks=tuple(ranks),
        scaling=tuple(16.0 / r for r in ranks),
        base=normal(*tokens, O) if base and not linear else None,
        dy=normal(*tokens, O),
        **rest,
    )
    if router:
        problem.router_weight = normal(N, K, std=K**-0.5, dtype=parameter_dtype)
        if bias:
            shift = torch.distributions.Normal(0.0, 1.0).icdf(
                torch.tensor(min(max(open_share, 1e-6), 1 - 1e-6))
            )
            problem.router_bias = (normal(N, std=0.1) + shift * 1.4).to(parameter_dtype)
        if dgates:
            problem.dgates = normal(
                *tokens, N, dtype=torch.float64 if dtype == torch.float64 else torch.float32
            )
    else:
        closed = torch.rand(*tokens, N, generator=generator) >= open_share
        problem.gates = normal(*tokens, N).masked_fill(closed, 0.0)
    if linear:
        problem.weight, problem.bias = normal(O, K, std=K**-0.5), normal(O) if bias else None
    return problem


def formula(p: Problem, t: dict[str, Tensor], gates: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and gates from tensors of one dtype, expert by expert; `gates` overrides the router's (to fix what is open)."""
    x = t["x"]
    if "router_weight" in t:
        h = x @ t["router_weight"].t()
        if "router_bias" in t:
            h = h + t["router_bias"]
        g = torch.relu(h) if gates is None else torch.where(gates, h, torch.zeros_like(h))
    else:
        g = t["gates"]
    dropped = x if p.keep is None else torch.where(p.keep, x / (1.0 - p.dropout_p), torch.zeros_like(x))
    y = x @ t["weight"].t() if "weight" in t else t.get("base")
    if "bias" in t:
        y = y + t["bias"]
    start = 0
    for i, (rank, scaling) in enumerate(zip(p.ranks, p.scaling, strict=True)):
        A, B = t["A"][start : start + rank], t["B"][:, start : start + rank]
        delta = (dropped @ A.t() @ B.t()) * (scaling * g[..., i, None])
        y = delta if y is None else y + delta
        start += rank
    return y, g


def _evaluate(p: Problem, dtype: torch.dtype, open_: Tensor | None) -> Result:
    # parameters are rounded to x's dtype first, as under autocast: the oracle measures the arithmetic, not this rounding
    leaves = {n: v.detach().to(dtype).requires_grad_() for n, v in p.tensors.items()}
    if p.gates is not None:
        leaves["gates"] = p.gates.detach().to(dtype).requires_grad_()
    y, g = formula(p, leaves, open_)
    outputs, grads_out = [y], [p.dy.to(dtype)]
    if p.dgates is not None:
        outputs.append(g)
        grads_out.append(p.dgates.to(dtype))
    found = torch.autograd.grad(outputs, list(leaves.values()), grads_out, allow_unused=True)
    grads = {
        n: torch.zeros_like(t) if d is None else d for (n, t), d in zip(leaves.items(), found, strict=True)
    }
    if p.gates is not None and p.gate_grad == "open":
        grads["gates"] = torch.where(p.gates.expand_as(grads["gates"]) != 0, grads["gates"], 0.0)
    return Result(y.detach(), g.detach(), grads)


def oracle(p: Problem, open_: Tensor | None = None) -> Result:
    """Float64, from inputs rounded as the operation rounds them. `open_` fixes which gates of a router are open, for the sign of a
    logit within rounding of 0 is not the operation's to know."""
    rounded = {}
    for f in fields(p):
        value = getattr(p, f.name)
        if f.name in ("A", "B", "router_weight"):
            value = None if value is None else value.to(p.x.dtype)
        rounded[f.name] = value
    return _evaluate(Problem(**rounded), torch.float64, open_)


def eager(p: Problem, open_: Tensor | None = None) -> Result:
    """The same formula in plain PyTorch in x's dtype, with parameters cast by `w.to(x.dtype)`."""
    return _evaluate(p, p.x.dtype, open_)


def operation(
    p: Problem, *, backend: str, inplace: bool = False, needs: tuple[str, ...] | None = None
) -> Result:
    """What the package computes. `needs` names the tensors whose gradients are asked for (default: all)."""
    leaves = {
        n: v.detach().requires_grad_(needs is None or n in needs) if v.is_floating_point() else v
        for n, v in p.tensors.items()
    }
    base = leaves.get("base")
    if inplace:  # a non-leaf that autograd may overwrite
        base = (
            leaves["base"].clone(memory_format=torch.preserve_format)
            if base.requires_grad
            else leaves["base"].clone()
        )
    common = {
        "ranks": p.ranks,
        "scaling": p.scaling,
        "base": base,
        "inplace": inplace,
        "dropout_p": p.dropout_p,
        "seed": p.dropout_seed,
        "backend": backend,
    }
    if p.weight is not None:
        del common["base"], common["inplace"]
        names = ("x", "weight", "bias", "A", "B", "router_weight", "router_bias")
        y, g = rectified_linear(*(leaves.get(name) for name in names), return_gates=True, **common)
    elif p.gates is None:
        y, g = rectified_mixture(
            *(leaves["x"], leaves["A"], leaves["B"], leaves["router_weight"], leaves.get("router_bias")),
            return_gates=True,
            **common,
        )
    else:
        y, g = (
            gated_mixture(
                leaves["x"], leaves["A"], leaves["B"], leaves["gates"], gate_grad=p.gate_grad, **common
            ),
            None,
        )
    wanted = {n: t for n, t in leaves.items() if t.requires_grad}
    outputs, grads_out = [y], [p.dy]
    if p.dgates is not None and g is not None and g.requires_grad:
        outputs.append(g)
        grads_out.append(p.dgates)
    if not y.requires_grad:
        outputs, grads_out = outputs[1:], grads_out[1:]
    found = torch.autograd.grad(outputs, list(wanted.values()), grads_out, allow_unused=True)
    return Result(y.detach(), None if g is None else g.detach(), dict(zip(wanted, found, strict=True)))


def typical(p: Problem, open_: Tensor | None = None) -> Result:
    """How large the terms are that each result sums: the root of the sum of their squares, from the formula on squared inputs.
    One rounding of an operand moves a result by about eps times this, also where its terms cancel."""
    squares = {n: t.double().square() for n, t in p.tensors.items()}
    squared = replace(
        p,
        **squares,
        dy=p.dy.double().square(),
        dgates=None if p.dgates is None else p.dgates.double().square(),
        scaling=tuple(s * s / (1.0 - p.dropout_p) for s in p.scaling),
    )
    result = _evaluate(squared, torch.float64, open_)
    return Result(result.y.sqrt(), result.gates.sqrt(), {n: g.sqrt() for n, g in result.grads.items()})


def assert_as_accurate_as_eager(
    value: Tensor, plain: Tensor, truth: Tensor, terms: Tensor, what: str, dtype: torch.dtype
) -> None:
    """At most twice the error of plain PyTorch in x's dtype; a few roundings are always allowed, for in small problems plain
    PyTorch can be exact by luck."""
    assert value.shape == truth.shape, f"{what}: shape {tuple(value.shape)}, want {tuple(truth.shape)}"
    if truth.numel() == 0:
        return
    got, eager_error = ((t.double() - truth).abs().max().item() for t in (value, plain))
    # float64: the truth has no more digits than the result; 16 bits: an operand and the result are each rounded; float32:
    # tensor cores truncate three tf32 products where plain PyTorch rounds (test_accuracy.py of the CUDA kernels has numbers)
    roundings = {torch.float64: 64, torch.float32: 16}.get(dtype, 2)
    slack = roundings * torch.finfo(dtype).eps * max(terms.max().item(), truth.abs().max().item())
    assert got <= max(2 * eager_error, slack), f"{what}: error {got:.3e}, plain PyTorch's {eager_error:.3e}"


def check(p: Problem, *, backend: str, **how) -> Result:
    """Values and all asked-for gradients against float64."""
    result = operation(p, backend=backend, **how)
    open_ = None if result.gates is None else result.gates > 0
    truth, plain, terms = (f(p, open_) for f in (oracle, eager, typical))
    dtype = p.x.dtype
    assert_as_accurate_as_eager(result.y, plain.y, truth.y, terms.y, "y", dtype)
    if result.gates is not None:
        assert_as_accurate_as_eager(result.gates, plain.gates, truth.gates, terms.gates, "gates", dtype)
        h = true_logits(p)
        doubtful = h.abs() < 1e-5 * h.abs().max() if h.numel() else h.bool()
        assert ((open_ == (h > 0)) | doubtful).all(), "a gate of the wrong sign"
    for name, grad in result.grads.items():
        assert grad is not None, f"no gradient for {name}"
        assert grad.dtype == p.tensors[name].dtype, f"{name}: gradient in {grad.dtype}"
        pieces = (plain.grads[name], truth.grads[name], terms.grads[name])
        assert_as_accurate_as_eager(grad, *pieces, f"gradient of {name}", dtype)
    return result


def true_logits(p: Problem) -> Tensor:
    """The router's logits in float64, from weights rounded to x's dtype."""
    h = p.x.double() @ p.router_weight.to(p.x.dtype).double().t()
    return h if p.router_bias is None else h + p.router_bias.double()


def with_dropout(p: Problem, keep: Tensor, dropout_p: float, seed: int) -> Problem:
    return replace(p, keep=keep.view(p.x.shape), dropout_p=dropout_p, dropout_seed=seed)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within this context PyTorch has this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
