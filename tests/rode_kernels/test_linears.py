"""`rectified_linears`: layers that read the same x give what each would give by itself, whoever watches."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixture_oracle import (
    ON_GPUS,
    assert_as_accurate_as_eager,
    eager,
    oracle,
    random_problem,
    typical,
    with_dropout,
)
from rode_kernels import AdaptedLinear, rectified_linear, rectified_linears
from rode_kernels.backends.reference import dropout_keep

NAMES = ("weight", "bias", "A", "B", "router_weight", "router_bias")


def problems(tokens=(2, 9), widths=(20, 12, 12), ranks=((2, 4, 8), (3,), (1, 5)), K=24, **rest):
    found = [
        random_problem(tokens, K=K, O=O, ranks=r, seed=j, linear=True, **rest)
        for j, (O, r) in enumerate(zip(widths, ranks, strict=True))
    ]
    for p in found:
        p.x = found[0].x
    return found


def leaves_of(ps):
    for p in ps:
        for t in p.tensors.values():
            t.requires_grad_()
    return ps


def linears_of(ps):
    return [AdaptedLinear(*(getattr(p, name) for name in NAMES), p.ranks, p.scaling) for p in ps]


def together(ps, x=None, **options):
    return rectified_linears(ps[0].x if x is None else x, linears_of(ps), **options)


def apart(ps, x=None, **options):
    x = ps[0].x if x is None else x
    return [
        rectified_linear(x, *linear[:6], ranks=linear.ranks, scaling=linear.scaling, **options)
        for linear in linears_of(ps)
    ]


def wanted_of(ps):
    return [ps[0].x, *(t for p in ps for name, t in p.tensors.items() if name != "x")]


def gradients(ys, ps):
    return torch.autograd.grad(sum(y.double().square().sum() for y in ys), wanted_of(ps), allow_unused=True)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(torch.float64, None), (torch.float32, None), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_values_and_gradients(backend, dtype, parameter_dtype, dropout_p):
    """Beside the formula in float64; x's gradient is the sum of all layers'."""
    ps = problems(dtype=dtype, parameter_dtype=parameter_dtype)
    if dropout_p:
        keep = dropout_keep(torch.tensor([3]), dropout_p, 18, 24)
        ps = [with_dropout(p, keep, dropout_p, 3) for p in ps]
    leaves_of(ps)
    outputs = together(ps, dropout_p=dropout_p, seed=3, return_gates=True, backend=backend)
    flat = [t for pair in outputs for t in pair]
    sent = [t for p in ps for t in (p.dy, p.dgates)]
    found = iter(torch.autograd.grad(flat, wanted_of(ps), sent))
    ways = [
        [f(p, g.detach() > 0) for p, (_, g) in zip(ps, outputs, strict=True)]
        for f in (oracle, eager, typical)
    ]
    truth, plain, terms = ways
    sums = [sum(result.grads["x"] for result in way) for way in ways]
    assert_as_accurate_as_eager(next(found), sums[1], sums[0], sums[2], "gradient of x", dtype)
    for j, (p, (y, g)) in enumerate(zip(ps, outputs, strict=True)):
        assert_as_accurate_as_eager(y.detach(), plain[j].y, truth[j].y, terms[j].y, f"y of {j}", dtype)
        assert_as_accurate_as_eager(
            g.detach(), plain[j].gates, truth[j].gates, terms[j].gates, f"gates of {j}", dtype
        )
        for name in p.tensors:
            if name == "x":
                continue
            have = next(found)
            assert have.dtype == p.tensors[name].dtype
            pieces = (way[j].grads[name] for way in (plain, truth, terms))
            assert_as_accurate_as_eager(have, *pieces, f"gradient of {name} of {j}", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_layer_draws_its_own_mask(backend, dtype):
    """As single layers do, one after the other."""
    ps = leaves_of(problems((2, 36), dtype=dtype))
    found = []
    for f in (together, apart):
        torch.manual_seed(1)
        ys = f(ps, dropout_p=0.4, backend=backend)
        found.append([*ys, *gradients(ys, ps)])
    for have, want in zip(*found, strict=True):
        assert (have.double() - want.double()).norm() <= 2**-7 * want.double().norm()


def test_one_layer_and_no_bias(backend):
    ps = leaves_of(problems(widths=(7,), ranks=((2, 1),), bias=False))
    for have, want in zip(
        gradients(together(ps, backend=backend), ps), gradients(apart(ps, backend=backend), ps), strict=True
    ):
        torch.testing.assert_close(have, want)


def test_a_layer_that_nothing_reaches(backend):
    """Its parameters get no gradients, not even zeros, and x's are those of the others."""
    ps = leaves_of(problems())
    have, want = (gradients(f(ps, backend=backend)[1:], ps) for f in (together, apart))
    for a, b in zip(have, want, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_frozen_weights_and_x_without_gradient(backend):
    ps = problems()
    for p in ps:
        p.A.requires_grad_()
    wanted = [p.A for p in ps]
    have, want = (
        torch.autograd.grad(sum(y.square().sum() for y in f(ps, backend=backend)), wanted)
        for f in (together, apart)
    )
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("tokens", [(), (0,), (1,)], ids=str)
def test_few_tokens(backend, tokens):
    ps = leaves_of(problems(tokens))
    have, want = (f(ps, backend=backend) for f in (together, apart))
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(have, ps), gradients(want, ps), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(backend, reentrant):
    ps = leaves_of(problems())

    def run(x):
        return tuple(together(ps, x, dropout_p=0.3, backend=backend))

    torch.manual_seed(1)
    want = gradients(run(ps[0].x * 1), ps)
    torch.manual_seed(1)
    ys = checkpoint(run, ps[0].x * 1, use_reentrant=reentrant)
    sum(y.double().square().sum() for y in ys).backward()
    for t, expected in zip(wanted_of(ps), want, strict=True):
        assert torch.equal(t.grad, expected)


def test_selective_checkpointing(backend):
    ps = leaves_of(problems())
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x):
        return tuple(y.sin() for y in together(ps, x, backend=backend))

    want = gradients(run(ps[0].x), ps)
    ys = checkpoint(
        run, ps[0].x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)
    )
    for a, b in zip(gradients(ys, ps), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_autocast(backend):
    ps = leaves_of(problems())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have, want = together(ps, backend=backend), apart(ps, backend=backend)
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)
    for t, g in zip(wanted_of(ps), gradients(have, ps), strict=True):
        assert g.dtype == t.dtype


def test_compile(backend):
    torch._dynamo.reset()
    ps = leaves_of(problems())
    compiled = torch.compile(lambda x: together(ps, x, backend=backend), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        gradients(compiled(ps[0].x), ps), gradients(together(ps, backend=backend), ps), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_first_and_second_derivatives(backend):
    if backend in ON_GPUS:
        pytest.skip("takes no float64")
    ps = leaves_of(problems((3,), widths=(4, 5), ranks=((2, 1), (2,)), K=5, dtype=torch.float64))
    inputs = wanted_of(ps)

    def f(*_):
        return tuple(together(ps, dropout_p=0.3, seed=2, backend=backend))

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.filterwarnings("ignore:rode_kernels")
def test_transforms():
    ps = problems(dtype=torch.float64)
    for transform in (
        lambda f: grad(lambda x: sum(y.sin().sum() for y in f(x))),
        lambda f: vmap(lambda x: tuple(f(x))),
    ):
        have, want = (transform(lambda x, f=f: f(ps, x))(ps[0].x) for f in (together, apart))
        torch.testing.assert_close(have, want)


def test_errors_name_the_layer():
    ps = problems()
    with pytest.raises(ValueError, match="linears: expected at least one layer"):
        rectified_linears(ps[0].x, [])
    ps[1].weight = ps[1].weight[:, :-1]
    with pytest.raises(ValueError, match=r"linears\[1\]: weight: expected shape"):
        together(ps)
    ps = problems()
    ps[2].B = None
    with pytest.raises(TypeError, match=r"linears\[2\]: B: expected a torch.Tensor, got NoneType"):
        together(ps)


def test_what_is_saved_for_backward(backend):
    """x once, u, g and weights: neither a product nor y."""
    ps = leaves_of(problems((64,), K=256, widths=(256, 256), ranks=((2, 4), (8,)), dtype=torch.bfloat16))
    known = {t.untyped_storage().data_ptr() for t in wanted_of(ps)[1:]}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        together(ps, backend=backend)
    assert sum(saved.values()) <= 1.02 * (ps[0].x.nbytes + 64 * 4 * (6 + 8 + 3))
