"""`rectified_linear`: the values and gradients of the product and the mixture, as one node, whoever watches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mixture_oracle import MIXED, ON_GPUS, check, operation, random_problem, with_dropout
from rode_kernels import backends, fast_path, rectified_linear, rectified_mixture
from rode_kernels.backends.reference import dropout_keep

NAMES = ("x", "weight", "bias", "A", "B", "router_weight", "router_bias")
CPU = pytest.mark.skipif(not backends()["cpu"].available, reason="no native code")


def call(p, **changes):
    """`rectified_linear` of a problem's tensors, some of them changed, and options."""
    options = {"ranks": p.ranks, "scaling": p.scaling}
    operands = {name: getattr(p, name) for name in NAMES}
    for name, value in changes.items():
        (operands if name in NAMES else options)[name] = value
    return rectified_linear(*operands.values(), **options)


def apart(p, **changes):
    """The same as two operations of which neither overwrites anything."""
    options = {"ranks": p.ranks, "scaling": p.scaling}
    t = {name: getattr(p, name) for name in NAMES}
    for name, value in changes.items():
        (t if name in NAMES else options)[name] = value
    base = F.linear(t["x"], t["weight"], t["bias"])
    return rectified_mixture(
        t["x"], t["A"], t["B"], t["router_weight"], t["router_bias"], base=base, **options
    )


def leaves_of(p):
    for t in p.tensors.values():
        t.requires_grad_()
    return p


def gradients(y, p, *more):
    return torch.autograd.grad(y.double().square().sum(), [*p.tensors.values(), *more])


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("dtype", "parameter_dtype"), MIXED, ids=str)
@pytest.mark.parametrize("tokens", [(), (17,), (2, 9)], ids=str)
def test_values_and_gradients(backend, tokens, dtype, parameter_dtype, bias):
    check(
        random_problem(tokens, dtype=dtype, parameter_dtype=parameter_dtype, bias=bias, linear=True),
        backend=backend,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout(backend, dtype):
    p = random_problem((3, 7), dtype=dtype, linear=True)
    keep = dropout_keep(torch.tensor([5]), 0.4, 21, p.x.shape[-1])
    check(with_dropout(p, keep, 0.4, 5), backend=backend)


@pytest.mark.parametrize(
    "needs", [("x",), ("weight",), ("bias", "B"), ("A", "router_weight"), ("x", "weight", "bias")], ids=str
)
def test_gradients_asked_for_are_those_of_all(backend, needs):
    p = random_problem((11,), linear=True)
    every, some = (operation(p, backend=backend, needs=which).grads for which in (None, needs))
    assert set(some) == set(needs)
    for name in needs:
        torch.testing.assert_close(some[name], every[name], rtol=1e-6, atol=1e-6)


def test_gates_alone_have_a_gradient(backend):
    p = leaves_of(random_problem((5,), linear=True))
    _, g = call(p, return_gates=True, backend=backend)
    _, like = apart(p, return_gates=True, backend=backend)
    wanted = [p.x, p.router_weight]
    for have, want in zip(
        torch.autograd.grad(g.sum(), wanted), torch.autograd.grad(like.sum(), wanted), strict=True
    ):
        torch.testing.assert_close(have, want)
    assert torch.autograd.grad(
        call(p, return_gates=True, backend=backend)[1].sum(), p.weight, allow_unused=True
    ) == (None,)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_random_problems_on_the_cpu(data):
    draw = data.draw
    tokens = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    p = random_problem(
        tokens,
        K=draw(st.integers(1, 40)),
        O=draw(st.integers(1, 40)),
        ranks=tuple(draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])),
        bias=draw(st.booleans()),
        open_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        linear=True,
    )
    for backend in ("cpu", "reference"):
        if backends()[backend].available:
            check(p, backend=backend)


@pytest.mark.parametrize("tokens", [(0,), (2, 0)], ids=str)
def test_no_tokens(backend, tokens):
    p = leaves_of(random_problem(tokens, linear=True))
    y = call(p, backend=backend)
    assert y.shape == (*tokens, 20)
    for t, g in zip(p.tensors.values(), torch.autograd.grad(y.sum(), p.tensors.values()), strict=True):
        assert g.shape == t.shape
        assert not g.any()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tokens", [(), (6,), (2, 3)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_forward_bits_are_those_of_the_operations_apart(backend, tokens, bias, grad):
    """And y is nobody's view: it may be written to, as a linear layer's output may."""
    p = random_problem(tokens, linear=True, bias=bias)
    if grad:
        leaves_of(p)
    y = call(p, backend=backend)
    assert torch.equal(y, apart(p, backend=backend))
    assert not y._is_view()
    y += 1
    if grad:
        assert len(gradients(y, p)) == len(p.tensors)


@CPU
@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("tokens", [(1,), (2, 3)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fast_path_gives_what_the_long_way_gives(monkeypatch, tokens, dropout_p, frozen, dtype):
    p = leaves_of(random_problem(tokens, dtype=dtype, parameter_dtype=torch.float32, linear=True))
    p.weight.requires_grad_(not frozen)
    p.bias.requires_grad_(not frozen)
    wanted = [t for t in p.tensors.values() if t.requires_grad]

    def run():
        torch.manual_seed(0)
        y, g = call(p, dropout_p=dropout_p, return_gates=True)
        return y, g, *torch.autograd.grad(y.double().square().sum() + g.sum(), wanted)

    first, again = run(), run()
    assert fast_path._known
    with monkeypatch.context() as patch:
        patch.setattr(fast_path, "call_linear", lambda *_: None)
        slow = run()
    for a, b, c in zip(first, again, slow, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@CPU
@pytest.mark.usefixtures("nothing_known")
@pytest.mark.parametrize("grad", [True, False])
def test_a_call_that_is_known_raises_what_the_first_would(grad):
    p = random_problem((4,), linear=True)
    call(p)
    wrong = {
        "weight: expected shape": p.weight[:, :-1],
        "weight: expected dtype torch.float32": p.weight.double(),
        "weight: expected a torch.Tensor, got NoneType": None,
    }
    for message, weight in wrong.items():
        with pytest.raises((TypeError, ValueError), match=message), torch.set_grad_enabled(grad):
            call(p, weight=weight)
    for message, bias in {"bias: expected shape": p.bias[:-1], "bias: expected dtype": p.bias.half()}.items():
        with pytest.raises((TypeError, ValueError), match=message):
            call(p, bias=bias)
    with pytest.raises(ValueError, match="bias: expected on cpu"):
        call(p, bias=p.bias.to("meta"))


class Keeper(TorchDispatchMode):
    """Keeps what products return, as selective checkpointing does."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.linear.default):
            self.kept.append((out, out.clone()))
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_what_a_mode_keeps_is_not_overwritten(backend, grad):
    p = random_problem((4,), linear=True)
    if grad:
        leaves_of(p)
    want = call(p, backend=backend)
    with Keeper() as keeper:
        y = call(p, backend=backend)
    assert keeper.kept
    for kept, before in keeper.kept:
        assert torch.equal(kept, before)
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing(backend, reentrant, dropout_p):
    p = leaves_of(random_problem((20,), linear=True))

    def run(x):
        return call(p, x=x, dropout_p=dropout_p, backend=backend)

    torch.manual_seed(1)
    expected = gradients(run(p.x * 1), p)
    for t in p.tensors.values():
        t.grad = None
    torch.manual_seed(1)
    checkpoint(run, p.x * 1, use_reentrant=reentrant).double().square().sum().backward()
    for t, want in zip(p.tensors.values(), expected, strict=True):
        assert torch.equal(t.grad, want)


def test_selective_checkpointing(backend):
    p = leaves_of(random_problem((20,), linear=True))
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]

    def policy(ctx, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x):
        return call(p, x=x, backend=backend).sin()

    want = gradients(run(p.x), p)
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    have = gradients(checkpoint(run, p.x, use_reentrant=False, context_fn=contexts), p)
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile(backend, way):
    torch._dynamo.reset()
    p = leaves_of(random_problem((7,), linear=True))
    compiled = torch.compile(
        lambda x: call(p, x=x, backend=backend).square().sum(), fullgraph=True, dynamic=True, backend=way
    )
    wanted = list(p.tensors.values())
    for have, want in zip(
        torch.autograd.grad(compiled(p.x), wanted),
        torch.autograd.grad(call(p, backend=backend).square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=str)
def test_autocast_is_that_of_linear(backend, dtype, parameters):
    p = leaves_of(random_problem((30,), linear=True))
    with torch.autocast("cpu", dtype=dtype):
        y = call(p, backend=backend)
        want = apart(p, backend=backend)
    assert y.dtype == want.dtype == dtype
    assert torch.equal(y, want)
    for t, g in zip(p.tensors.values(), gradients(y, p), strict=True):
        assert g.dtype == t.dtype


def test_autocast_around_the_backward_pass_changes_no_bit(backend):
    p = leaves_of(random_problem((9,), linear=True))
    want = gradients(call(p, backend=backend), p)
    y = call(p, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        have = gradients(y, p)
    for a, b in zip(have, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck_and_second_derivatives(backend, dropout_p):
    if backend in ON_GPUS:
        pytest.skip("takes no float64")
    p = leaves_of(random_problem((5,), K=6, O=5, ranks=(2, 3, 1), dtype=torch.float64, linear=True))

    def f(*tensors):
        return rectified_linear(
            *tensors, ranks=p.ranks, scaling=p.scaling, dropout_p=dropout_p, seed=4, backend=backend
        )

    inputs = [getattr(p, name) for name in NAMES]
    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.filterwarnings("ignore:rode_kernels")
def test_transforms():
    p = random_problem((2, 3), K=6, O=5, ranks=(2, 1), dtype=torch.float64, linear=True)
    tangent = torch.randn_like(p.x)

    def of(function):
        return lambda x: function(p, x=x).sin()

    results = (
        (jvp(f, (p.x,), (tangent,))[1], jacfwd(f)(p.x), grad(lambda x, f=f: f(x).sum())(p.x), vmap(f)(p.x))
        for f in (of(call), of(apart))
    )
    for have, want in zip(*results, strict=True):
        torch.testing.assert_close(have, want)


def test_a_trace_records_the_operator():
    p = random_problem((3,), linear=True)
    traced = torch.jit.trace(lambda x: call(p, x=x), p.x, check_trace=False)
    assert "PythonOp" not in str(traced.graph)
    other = torch.randn_like(p.x)
    torch.testing.assert_close(traced(other), call(p, x=other))


def test_a_weight_that_changes_before_backward_is_noticed(backend):
    p = leaves_of(random_problem((3,), linear=True))
    y = call(p, backend=backend)
    with torch.no_grad():
        p.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_is_saved_for_backward(backend):
    """x, u, g and weights: neither the product nor y."""
    p = leaves_of(
        random_problem((256,), K=512, O=768, dtype=torch.bfloat16, parameter_dtype=torch.float32, linear=True)
    )
    known = {t.untyped_storage().data_ptr() for name, t in p.tensors.items() if name != "x"}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(p, backend=backend)
    assert sum(saved.values()) <= 1.02 * (p.x.nbytes + 256 * 4 * (sum(p.ranks) + len(p.ranks)))


def test_functional_call_of_a_module_that_uses_it():
    class Layer(nn.Module):
        def __init__(self, p):
            super().__init__()
            self.p, self.A, self.weight = p, nn.Parameter(p.A), nn.Parameter(p.weight)

        def forward(self, x):
            return call(self.p, x=x, A=self.A, weight=self.weight)

    p = random_problem((4,), dtype=torch.float64, linear=True)
    layer, other = Layer(p), {"A": torch.randn_like(p.A), "weight": torch.randn_like(p.weight)}
    torch.testing.assert_close(functional_call(layer, other, p.x), apart(p, **other))
