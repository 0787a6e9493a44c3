"""The operation as a citizen of PyTorch: gradcheck, opcheck, compile, autocast, checkpointing, memory saved for backward."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mixture_oracle import ON_GPUS, operation, oracle, random_problem
from rode_kernels import gated_mixture, rectified_mixture


def call(p, x=None, **kwargs):
    leading = (p.x if x is None else x, p.A, p.B)
    kwargs = {"ranks": p.ranks, "scaling": p.scaling, "base": p.base, **kwargs}
    if p.gates is not None:
        return gated_mixture(*leading, p.gates, gate_grad=p.gate_grad, **kwargs)
    return rectified_mixture(*leading, p.router_weight, p.router_bias, **kwargs)


def leaves_of(p):
    for t in p.tensors.values():
        t.requires_grad_()
    return p


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("tokens", [(5,), (2, 3)])
def test_gradcheck(backend, tokens, dropout_p):
    if backend in ON_GPUS:
        pytest.skip("takes no float64")
    p = random_problem(tokens, K=6, O=5, ranks=(2, 3, 1), dtype=torch.float64)
    inputs = [t.requires_grad_() for t in p.tensors.values()]

    def f(x, A, B, Wr, br, base):
        return rectified_mixture(
            *(x, A, B, Wr, br),
            ranks=p.ranks,
            scaling=p.scaling,
            base=base,
            dropout_p=dropout_p,
            seed=4,
            return_gates=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(f, inputs)


@pytest.mark.parametrize("gate_grad", ["open", "all"])
def test_gradcheck_gated(backend, gate_grad):
    if backend in ON_GPUS:
        pytest.skip("takes no float64")
    share = 1.0 if gate_grad == "open" else 0.4  # "open" is defined, not derived, where gates are 0
    p = random_problem((6,), K=6, O=5, ranks=(2, 3), dtype=torch.float64, router=False, open_share=share)
    inputs = [p.x, p.A, p.B, p.gates, p.base]

    def f(x, A, B, gates, base):
        return gated_mixture(
            *(x, A, B, gates),
            ranks=p.ranks,
            scaling=p.scaling,
            base=base,
            gate_grad=gate_grad,
            backend=backend,
        )

    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_opcheck(backend, router):
    p = leaves_of(random_problem((2, 5), router=router, dtype=torch.float32))
    static = (p.ranks, p.scaling, 0.3, False, backend)
    args = (p.x, p.A, p.B, p.router_weight, p.router_bias, p.gates)
    seed = torch.tensor([3])
    torch.library.opcheck(torch.ops.rode.mixture.default, (*args, p.base, seed, *static))
    plain = [None if t is None else t.detach() for t in args]
    base = p.base.detach().clone()
    torch.library.opcheck(
        torch.ops.rode.mixture_.default,
        (*plain, base, seed, *static),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )
    y, u, g = torch.ops.rode.mixture(*plain, base, seed, *static)
    needs = [True] * 3 + [router, router, not router]
    torch.library.opcheck(
        torch.ops.rode.mixture_backward.default,
        (y, g if router else None, plain[0], u, g, plain[1], plain[2], plain[3], seed, *static, needs),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_dropout_without_a_seed_is_refused(backend):
    p = random_problem((2, 5), router=True, dtype=torch.float32)
    args = (p.x, p.A, p.B, p.router_weight, p.router_bias, p.gates)
    with pytest.raises(ValueError, match=r"seed: expected \(1,\) int64 with dropout_p=0.3, got None"):
        torch.ops.rode.mixture(*args, p.base, None, p.ranks, p.scaling, 0.3, False, backend)


@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
@pytest.mark.parametrize("inplace", [False, True])
def test_compile_with_dynamic_token_counts(backend, router, inplace):
    graphs = 0

    def counting(module, inputs):
        nonlocal graphs
        graphs += 1
        return module.forward

    ranks, scaling = (2, 4, 8, 16), (8.0, 4.0, 2.0, 1.0)
    kwargs = {"ranks": ranks, "scaling": scaling, "backend": backend, "inplace": inplace}

    def step(x, A, B, *rest):
        base = rest[-1] * 1
        if router:
            y, g = rectified_mixture(x, A, B, *rest[:-1], base=base, return_gates=True, **kwargs)
            return y.square().sum() + g.sum()
        return gated_mixture(x, A, B, *rest[:-1], base=base, **kwargs).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counting)
    for tokens in (5, 9, 33):
        inputs = [t.requires_grad_() for t in random_problem((tokens,), router=router).tensors.values()]
        expected = torch.autograd.grad(step(*inputs), inputs)
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for want, have in zip(expected, got, strict=True):
            torch.testing.assert_close(have, want)
    assert graphs == 1, "token counts must not recompile"


def test_compile_through_aot_autograd(backend):
    torch._dynamo.reset()
    p = leaves_of(random_problem((7,)))

    def step(x):
        return call(p, x, dropout_p=0.3, seed=2, backend=backend).square().sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    wanted = [p.x, p.A, p.B, p.router_weight, p.router_bias]
    for want, have in zip(
        torch.autograd.grad(step(p.x), wanted), torch.autograd.grad(compiled(p.x), wanted), strict=True
    ):
        torch.testing.assert_close(have, want)


@pytest.mark.slow
def test_compile_with_inductor(backend):
    torch._dynamo.reset()
    p = leaves_of(random_problem((7,)))
    compiled = torch.compile(
        lambda x: call(p, torch.relu(x), backend=backend).sum(), fullgraph=True, dynamic=True
    )
    for tokens in (7, 12):
        x = torch.randn(tokens, 24, requires_grad=True)
        p.base = torch.randn(tokens, 20)
        (got,) = torch.autograd.grad(compiled(x), x)
        (want,) = torch.autograd.grad(call(p, torch.relu(x), backend=backend).sum(), x)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_that_of_linear(backend, dtype):
    p = random_problem((30,))
    with torch.autocast("cpu", dtype=dtype):
        y = call(p, backend=backend)
    assert y.dtype == dtype
    low = random_problem((30,))
    low.x, low.base = p.x.to(dtype), p.base.to(dtype)
    assert torch.equal(y, call(low, backend=backend))


def test_autocast_leaves_float64_alone(backend):
    if backend in ON_GPUS:
        pytest.skip("takes no float64")
    p = random_problem((5,), dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(p, backend=backend).dtype == torch.float64


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointing(backend, reentrant, dropout_p):
    p = leaves_of(random_problem((20,)))
    wanted = list(p.tensors.values())

    def run(x):
        return call(p, x, dropout_p=dropout_p, backend=backend)

    torch.manual_seed(1)
    torch.autograd.backward(run(p.x * 1).square().sum())
    expected = [t.grad.clone() for t in wanted]
    for t in wanted:
        t.grad = None
    torch.manual_seed(1)
    torch.autograd.backward(checkpoint(run, p.x * 1, use_reentrant=reentrant).square().sum())
    for t, want in zip(wanted, expected, strict=True):
        assert torch.equal(t.grad, want)


def test_inference_mode_and_no_grad(backend):
    p = leaves_of(random_problem((20,)))
    with torch.inference_mode():
        inferred = call(p, backend=backend)
    with torch.no_grad():
        quiet = call(p, backend=backend)
    assert not inferred.requires_grad
    assert not quiet.requires_grad
    assert torch.equal(inferred, quiet)
    assert torch.equal(quiet, call(p, backend=backend).detach())


def test_second_derivatives_of_every_backend(backend):
    """Their error is at most twice that of plain PyTorch in the same dtype."""

    def second(backend, dtype):
        p = leaves_of(random_problem((5,), dtype=torch.float32))
        leaves = [
            getattr(p, name).detach().to(dtype).requires_grad_() for name in ("x", "A", "B", "router_weight")
        ]
        y = rectified_mixture(*leaves, ranks=p.ranks, scaling=p.scaling, backend=backend)
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), leaves)

    truth, plain = second("reference", torch.float64), second("reference", torch.float32)
    for found, like, want in zip(second(backend, torch.float32), plain, truth, strict=True):
        assert (found - want).abs().max() <= 2 * (like - want).abs().max() + 4e-6 * want.abs().max()


def test_the_gradients_operator_has_no_derivative():
    p = random_problem((5,), dtype=torch.float32)
    static = (p.ranks, p.scaling, 0.0, False, "reference")
    y, u, g = torch.ops.rode.mixture(p.x, p.A, p.B, p.router_weight, None, None, None, None, *static)
    x = p.x.clone().requires_grad_()
    dx, *_ = torch.ops.rode.mixture_backward(
        y, None, x, u, g, p.A, p.B, p.router_weight, None, *static, [True] + [False] * 5
    )
    with pytest.raises(RuntimeError, match="differentiate the public functions"):
        dx.sum().backward()


def test_backward_twice_with_retained_graph(backend):
    p = leaves_of(random_problem((5,)))
    loss = call(p, backend=backend).square().sum()
    first = torch.autograd.grad(loss, p.A, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, p.A)[0], first)


@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_inplace_gives_the_same_bits(backend, router):
    p = random_problem((30,), router=router, dtype=torch.bfloat16)
    plain, inplace = operation(p, backend=backend), operation(p, backend=backend, inplace=True)
    assert torch.equal(plain.y, inplace.y)
    for name, grad in plain.grads.items():
        assert torch.equal(grad, inplace.grads[name]), name


def test_inplace_writes_into_base_of_any_strides(backend):
    p = random_problem((3, 10))
    truth = oracle(p).y
    for base in (
        p.base.clone(),
        p.base.transpose(0, 1).contiguous().transpose(0, 1),
        p.base.mT.contiguous().mT,
    ):
        with torch.no_grad():
            y = call(p, base=base, inplace=True, backend=backend)
        assert y is base
        torch.testing.assert_close(base.double(), truth, rtol=1e-5, atol=1e-5)


def test_inplace_into_a_view(backend):
    """Before torch 2.15, F.linear with a bias and three dimensions returns a view."""
    p = leaves_of(random_problem((3, 10)))
    W, b = torch.randn(20, 24, requires_grad=True), torch.randn(20, requires_grad=True)
    wanted = [p.x, p.A, p.router_weight, W, b]

    def step(inplace):
        base = torch.nn.functional.linear(p.x, W, b)
        base = base if base._is_view() else base.view(base.shape)
        y = call(p, base=base, inplace=inplace, backend=backend)
        assert (y is base) == inplace
        return y.square().sum()

    for want, have in zip(
        torch.autograd.grad(step(False), wanted), torch.autograd.grad(step(True), wanted), strict=True
    ):
        assert torch.equal(want, have)


@pytest.mark.parametrize("times", [1, 3])  # the first call goes another way than those after it
def test_inplace_without_gradients_marks_base_as_changed(backend, times):
    p = random_problem((4,))
    leaf = torch.randn(p.base.shape, dtype=p.base.dtype, requires_grad=True)
    for _ in range(times):
        base = leaf.detach() + 1
        loss = (leaf * base).sum()  # saves base
        with torch.no_grad():
            call(p, base=base, inplace=True, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    with torch.inference_mode():  # whose tensors have no version
        call(p, base=p.base.clone(), inplace=True, backend=backend)


def test_inplace_marks_base_as_changed(backend):
    p = random_problem((4,))
    base = p.base.clone().requires_grad_() * 1
    square = base.square()  # saves base
    call(p, base=base, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_bytes_saved_for_backward(backend, dtype, router, dropout_p):
    """bytes(x) + 4 (R + N) per token and 2 %: nothing of width O, no copy of x, no mask. Parameters are not counted."""
    M, K, O = 256, 512, 768
    p = random_problem((M,), K=K, O=O, dtype=dtype, parameter_dtype=torch.float32, router=router)
    parameters = {
        t.untyped_storage().data_ptr() for n, t in p.tensors.items() if n in ("A", "B", "router_weight")
    }
    p = leaves_of(p)
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = p.x * 1  # storages of its own
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(p, x, dropout_p=dropout_p, backend=backend)
    budget = M * (K * x.element_size() + 4 * (sum(p.ranks) + len(p.ranks)))
    assert x.untyped_storage().data_ptr() in saved
    assert sum(saved.values()) <= 1.02 * budget


def test_strided_x_is_saved_as_it_is(backend):
    p = leaves_of(random_problem((6, 8)))
    x = (p.x * 1).transpose(0, 1).contiguous().transpose(0, 1)
    storages = set()

    def pack(t):
        if t.shape == x.shape:
            storages.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(p, x, backend=backend)
    assert storages == {x.untyped_storage().data_ptr()}
