"""Passes with matrix products by PyTorch, with the kernels between them on the emulator and on Triton's interpreter: values, what
is closed, what moves, and which calls go this way."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixture_oracle import ON_GPUS, Problem, check, operation, random_problem, with_dropout
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.cuda import emulated as cuda_emulated
from rode_kernels.backends.cuda.emulated import machine
from rode_kernels.backends.cuda.prepared import DropKernel, Kernels
from rode_kernels.backends.gpu import cost, gemm_path
from rode_kernels.backends.gpu.layout import Layout
from rode_kernels.backends.gpu.planner import prefer_gemm
from rode_kernels.backends.gpu.plans import ProblemShape
from rode_kernels.backends.reference import dropout_keep
from rode_kernels.backends.triton import backend as triton
from rode_kernels.mixture import make_mixture
from rode_kernels.operands import BackwardOperands, ForwardOperands, Gradients, Settings

if not backends()["cuda-emulated"].available:
    if os.environ.get("RODE_EMULATE") == "1":
        raise RuntimeError(backends()["cuda-emulated"].reason)
    pytest.skip(backends()["cuda-emulated"].reason, allow_module_level=True)
emulator = cuda_emulated.native
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = ["x", "A", "B", "router_weight", "router_bias"]


@pytest.fixture(autouse=True)
def forced() -> Iterator[None]:
    machine.gemm_path = triton.prefer_gemm_always = True
    scratch, gemm_path.SCRATCH_BYTES = gemm_path.SCRATCH_BYTES, 1000  # several parts also in small problems
    yield
    gemm_path.SCRATCH_BYTES = scratch
    machine.gemm_path, machine.seed, machine.multiprocessors = None, 0, 2
    triton.prefer_gemm_always = None


@pytest.fixture(params=ON_GPUS)
def backend(request) -> str:
    if request.param == "triton" and not (triton.status()[0] and triton.interpreted()):
        pytest.skip("needs TRITON_INTERPRET=1 from the start")
    return request.param


# a function-scoped fixture that is the same for all examples
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.one_of(st.tuples(st.integers(1, 40)), st.tuples(st.integers(1, 3), st.integers(1, 9))),
    K=st.integers(1, 40),
    O=st.integers(1, 40),
    ranks=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    dtype=st.sampled_from(DTYPES),
    params_fp32=st.booleans(),
    router=st.booleans(),
    bias=st.booleans(),
    inplace=st.booleans(),
    dropout=st.booleans(),
    seed=st.integers(0, 99),
)
def test_values(backend, tokens, K, O, ranks, dtype, params_fp32, router, bias, inplace, dropout, seed):
    parameters = torch.float32 if params_fp32 else dtype
    rest = dict(parameter_dtype=parameters, router=router, bias=bias, seed=seed)
    p = random_problem(tokens, K=K, O=O, ranks=tuple(ranks), dtype=dtype, **rest)
    if dropout:
        p = with_dropout(p, dropout_keep(torch.tensor([seed]), 0.3, p.x.numel() // K, K), 0.3, seed)
    machine.seed = seed
    check(p, backend=backend, inplace=inplace)


@pytest.mark.parametrize("parameter_dtype", [torch.half, torch.float32], ids=str)
def test_gradients_are_contiguous_in_their_parameters_type(backend, parameter_dtype):
    """Also where PyTorch's products are wider than they are."""
    p = random_problem((9,), K=33, O=20, ranks=(3, 8), dtype=torch.half, parameter_dtype=parameter_dtype)
    passes = triton if backend == "triton" else cuda_emulated
    settings = Settings(make_mixture(p.ranks, p.scaling), 0.0, False)
    args = (p.x, p.A, p.B, p.router_weight)
    _, u, g = passes.forward(ForwardOperands(*args, None, None, None, None), settings, False)
    operands = BackwardOperands(p.dy, None, p.x, u, g, *args[1:], None)
    found = passes.backward(operands, settings, (True, True, True, True, False, False))
    for grad, of in zip(found, args, strict=False):
        assert grad.is_contiguous()
        assert (grad.shape, grad.dtype) == (of.shape, of.dtype)


@pytest.mark.parametrize("ranks", [(1,) * 64, (16,) * 64, (500, 524)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_widest_mixtures(backend, ranks, dtype):
    check(random_problem((9,), K=24, O=40, ranks=ranks, dtype=dtype), backend=backend)


def gradients(
    p: Problem,
    wanted: list[str] = NAMES,
    dy: torch.Tensor | None = None,
    backend: str = "cuda-emulated",
    **options,
) -> dict[str, torch.Tensor]:
    leaves = {n: getattr(p, n).detach().requires_grad_(n in wanted) for n in NAMES}
    y = rectified_mixture(*leaves.values(), ranks=p.ranks, scaling=p.scaling, backend=backend, **options)
    found = torch.autograd.grad(y, [leaves[n] for n in wanted], p.dy if dy is None else dy)
    return dict(zip(wanted, found, strict=True))


def kernels() -> list[str]:
    return [launch["kernel"] for launch in emulator.launches()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_whatever_the_order_of_warps_and_blocks(dtype):
    p = random_problem((70,), K=40, O=48, ranks=(40, 40), dtype=dtype)
    results = []
    for machine.seed in range(4):
        results.append(operation(p, backend="cuda-emulated"))
    for other in results[1:]:
        assert torch.equal(other.y, results[0].y)
        assert all(torch.equal(grad, other.grads[n]) for n, grad in results[0].grads.items())


@pytest.mark.parametrize("wanted", [[n] for n in NAMES] + [["x", "B"], ["A", "router_bias"]], ids="+".join)
def test_gradients_that_are_asked_for_alone_are_the_same(backend, wanted):
    p = random_problem((20,), K=40, O=48, ranks=(40, 20, 20))
    everything, some = gradients(p, backend=backend), gradients(p, wanted, backend=backend)
    for n in wanted:
        torch.testing.assert_close(some[n], everything[n], rtol=1e-5, atol=1e-5)


def test_a_gradient_of_the_gates_alone(backend):
    p = random_problem((20,), K=40, O=48, ranks=(40, 20, 20))
    leaves = [getattr(p, n).detach().requires_grad_() for n in NAMES]
    found = {}
    for name in (backend, "reference"):
        _, gates = rectified_mixture(
            *leaves, ranks=p.ranks, scaling=p.scaling, backend=name, return_gates=True
        )
        found[name] = torch.autograd.grad(gates, leaves, p.dgates, allow_unused=True)
    for have, want in zip(found[backend], found["reference"], strict=True):
        torch.testing.assert_close(torch.zeros(()) if have is None else have, want, rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_in_a_closed_expert_reaches_nothing(backend):
    """By selection, not by a product with 0."""
    p = random_problem((12,), K=16, O=24, ranks=(8, 80))
    p.router_bias.copy_(torch.tensor([1e6, -1e6]))
    p.A[8:] = float("inf")
    y = rectified_mixture(
        *(p.x, p.A, p.B, p.router_weight, p.router_bias),
        **dict(ranks=p.ranks, scaling=p.scaling, backend=backend),
    )
    assert y.isfinite().all()
    found = gradients(p, backend=backend)
    assert all(found[n].isfinite().all() for n in ("A", "B", "router_weight", "router_bias"))
    assert (found["A"][8:] == 0).all()


def test_what_it_launches():
    """PyTorch's products are no launches of the emulator's. Without a router, and in widths that it likes, nothing is packed."""
    p = random_problem((20,), K=16, O=24, ranks=(40, 40), dtype=torch.bfloat16)
    check(p, backend="cuda-emulated")
    assert kernels() == ["pack_parameters", "apply_gates_backward"]
    gated = random_problem((20,), K=16, O=24, ranks=(40, 40), dtype=torch.bfloat16, router=False)
    check(gated, backend="cuda-emulated")
    assert kernels() == ["apply_gates_backward"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [40, 37])
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_what_dropout_leaves_of_a_part_is_what_the_reference_keeps(dtype, K, dropout_p):
    p = random_problem((21,), K=K, dtype=dtype)
    p.x[3] = float("inf")
    settings, seed = Settings(make_mixture(p.ranks, p.scaling), dropout_p, False), torch.tensor([5])
    layout = Layout.of(ForwardOperands(p.x, p.A, p.B, p.router_weight, None, None, None, seed), settings)
    drop, to = DropKernel(Kernels(emulator), layout, 0), torch.empty(9, K, dtype=dtype)
    wide = torch.cat([p.x, p.x], 1)[:, :K]  # rows that are not neighbours
    want = torch.where(dropout_keep(seed, dropout_p, 21, K), p.x, torch.zeros((), dtype=dtype))
    for source in (p.x, wide):
        emulator.reset(1)
        drop(source[7:16], to, seed, 7, 0)
        assert torch.equal(to, want[7:16])
    emulator.reset(2)
    drop(p.x, p.x, seed, 0, 0)
    assert torch.equal(p.x, want)


def test_a_copy_for_dropout_has_a_fixed_size():
    gemm_path.SCRATCH_BYTES = 2**26
    for tokens, K, dtype in (
        (8192, 4096, torch.bfloat16),
        (2**20, 32768, torch.float32),
        (65, 11008, torch.half),
    ):
        x = torch.empty(tokens, K, dtype=dtype, device="meta")
        part = gemm_path.tokens_of_a_part(x)
        assert 0 < part * K * dtype.itemsize <= 2**26
        assert part % 64 == 0


@pytest.mark.parametrize("wanted", [["x"], ["A"], ["router_weight"], ["B", "router_bias"]], ids="+".join)
@pytest.mark.parametrize("router", [True, False], ids=["routed", "gated"])
def test_gradients_with_dropout_that_are_asked_for_alone_are_the_same(wanted, router):
    if not router:
        p = random_problem((20,), K=40, O=48, ranks=(40, 20, 20), router=False)
        check(with_dropout(p, dropout_keep(torch.tensor([3]), 0.5, 20, 40), 0.5, 3), backend="cuda-emulated")
        assert kernels()[-1] == "drop_rows"
        return
    p = random_problem((20,), K=40, O=48, ranks=(40, 20, 20))
    everything, some = (gradients(p, of, dropout_p=0.5, seed=3) for of in (NAMES, wanted))
    for n in wanted:
        torch.testing.assert_close(some[n], everything[n], rtol=1e-5, atol=1e-5)


def test_strides_that_PyTorch_would_copy_go_by_the_kernels():
    p = random_problem((20,), K=16, O=24, ranks=(40, 40))
    for dy in (p.dy.t().contiguous().t(), p.dy[:1].expand(20, 24), p.dy[:, :1].expand(20, 24)):
        found = gradients(p, dy=dy)
        assert "grad_output_pass" in kernels()
        want = gradients(p, dy=dy.contiguous())
        assert "apply_gates_backward" in kernels()
        for n in NAMES:
            torch.testing.assert_close(found[n], want[n], rtol=1e-4, atol=1e-4)
    sliced = torch.cat([p.dy, p.dy], 1)[:, 3:27]
    gradients(p, dy=sliced)
    assert "apply_gates_backward" in kernels()


@pytest.mark.parametrize("router", [True, False], ids=["routed", "gated"])
@pytest.mark.parametrize("ranks", [(16,) * 7, (50, 33)], ids=str)
def test_the_kernels_between_move_what_the_formulas_say(ranks, router):
    M, K, O, R, N = 64, 128, 96, sum(ranks), len(ranks)
    p = random_problem((M,), K=K, O=O, ranks=ranks, router=router, dtype=torch.bfloat16, open_share=1.0)
    if router:
        p.router_bias.fill_(1e6)
        p.dgates = None
    else:
        p.gates.abs_().add_(0.1)
    of = ProblemShape(M, K, O, R, N, 2, routed=router)
    operation(p, backend="cuda-emulated")
    want = [step for step in cost.gemm_path(of, backward=True).steps if step.operations == 0.0]
    assert len(want) == len(emulator.launches())
    counted = sum(d["bytes"] for d in emulator.all_traffic())
    assert counted == pytest.approx(sum(step.l2 for step in want), rel=0.03)


def test_gates_that_may_reopen_get_their_gradient_where_they_are_closed(backend):
    p = random_problem((20,), K=40, O=48, ranks=(40, 20, 20), router=False, gate_grad="all")
    check(p, backend=backend)


@pytest.mark.parametrize(
    ("call", "forward", "backward"),
    [
        (ProblemShape(8192, 4096, 4096, 30, 4), False, False),
        (ProblemShape(8192, 4096, 4096, 64, 8), False, True),
        (ProblemShape(512, 4096, 4096, 64, 8), False, False),
        (ProblemShape(8192, 4096, 4096, 65, 8), True, True),
        (ProblemShape(65, 4096, 4096, 256, 16), True, True),
        (
            ProblemShape(64, 4096, 4096, 256, 16),
            False,
            False,
        ),  # a batch of decoding: the host is slower than the device
        (ProblemShape(8192, 4096, 4096, 30, 4, 4), False, True),
        (ProblemShape(512, 4096, 4096, 30, 4, 4), False, False),
        (ProblemShape(2048, 1024, 1024, 30, 4, 4), False, False),
        (ProblemShape(2048, 1024, 1024, 33, 4, 4), True, True),
        (ProblemShape(65, 4096, 4096, 256, 16, dropout=True), True, True),
        (ProblemShape(64, 4096, 4096, 256, 16, dropout=True), False, False),
        (ProblemShape(8192, 4096, 4096, 64, 8, dropout=True), False, False),
    ],
)
def test_which_calls_take_the_gemm_path(call, forward, backward):
    assert (prefer_gemm(call), prefer_gemm(call, backward=True)) == (forward, backward)


@pytest.mark.parametrize(
    ("call", "forward", "backward"),
    [
        (ProblemShape(8192, 4096, 4096, 30, 4), False, True),
        (ProblemShape(2048, 4096, 4096, 30, 4), False, False),
        (ProblemShape(2048, 4096, 4096, 33, 4), False, True),
        (ProblemShape(65, 64, 64, 65, 4), True, True),
        (ProblemShape(65, 64, 64, 65, 4, dropout=True), False, False),
        (ProblemShape(512, 4096, 4096, 30, 4, 4), True, False),
        (ProblemShape(256, 4096, 4096, 30, 4, 4), False, False),
        (ProblemShape(1024, 4096, 4096, 30, 4, 4), True, True),
        (ProblemShape(64, 4096, 4096, 30, 4, 4), False, False),
    ],
)
def test_which_calls_of_triton_take_the_gemm_path(call, forward, backward):
    assert (prefer_gemm(call, triton=True), prefer_gemm(call, backward=True, triton=True)) == (
        forward,
        backward,
    )


@pytest.mark.skipif(not (triton.status()[0] and triton.interpreted()), reason="needs TRITON_INTERPRET=1")
def test_a_capture_of_kernels_that_have_not_run_says_what_to_do(monkeypatch):
    from rode_kernels.backends.triton import device, gate_kernels

    class Refusing:
        def __getitem__(self, grid):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(device, "capturing", lambda x: True)
    monkeypatch.setattr(gate_kernels, "apply_gates", Refusing())
    with pytest.raises(RuntimeError, match=r"'apply_gates' could not be captured.*run the call once before"):
        operation(random_problem((9,), ranks=(40, 40), dtype=torch.half), backend="triton")


@pytest.mark.skipif(not (triton.status()[0] and triton.interpreted()), reason="needs TRITON_INTERPRET=1")
def test_the_choice_reaches_triton(monkeypatch):
    from rode_kernels.backends.triton import launch_forward, launch_gates

    seen = []
    for module in (launch_gates, launch_forward):
        run, name = module.forward, module.__name__
        monkeypatch.setattr(module, "forward", lambda *a, run=run, name=name: (seen.append(name), run(*a))[1])
    triton.prefer_gemm_always = None
    for tokens, dropout_p in ((65, 0.0), (64, 0.0), (65, 0.1)):
        p = random_problem((tokens,), K=16, O=24, ranks=(40, 40), dtype=torch.half)
        gradients(p, backend="triton", dropout_p=dropout_p, seed=1)
    assert [name.split(".")[-1] for name in seen] == ["launch_gates", "launch_forward", "launch_forward"]


def test_the_choice_reaches_the_kernels():
    machine.gemm_path = None
    p = random_problem((65,), K=16, O=24, ranks=(40, 40), dtype=torch.bfloat16)
    check(p, backend="cuda-emulated")
    assert "apply_gates_backward" in kernels()
    gradients(p, dropout_p=0.5, seed=1)
    assert "drop_rows" in kernels()
    check(random_problem((64,), K=16, O=24, ranks=(40, 40), dtype=torch.bfloat16), backend="cuda-emulated")
    assert "grad_output_pass" in kernels()


class OnTheEmulator:
    """In the place of `cuda._passes`, for what that makes on a device."""

    def forward_of(self, layout, device, *distances):
        return cuda_emulated._passes.forward_of(layout, 0, *distances)

    def backward_of(self, layout, device, *rest):
        return cuda_emulated._passes.backward_of(layout, 0, *rest)


@pytest.mark.parametrize("gemm_path", [False, True], ids=["kernels", "gemm"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("leading", [(1,), (2, 3)], ids=str)
def test_prepared_calls_of_cuda_give_what_the_long_way_gives(monkeypatch, gemm_path, inplace, leading):
    """What the shortcut keeps of a call, for a device; x, base and dy are not flat."""
    machine.gemm_path = gemm_path
    monkeypatch.setattr(cuda, "_passes", OnTheEmulator())
    monkeypatch.setattr(cuda, "_on_stream", lambda run, device, *args: run(*args, 0))
    monkeypatch.setattr(cuda, "refuses", lambda *args: "")
    p = random_problem(leading, K=40, O=20, ranks=(3, 8, 16), dtype=torch.half, parameter_dtype=torch.float32)
    settings, needs = Settings(make_mixture(p.ranks, p.scaling), 0.0, False), (True,) * 5 + (False,)
    x, base, dy, dgates = (t.view(-1, t.shape[-1]) for t in (p.x, p.base, p.dy, p.dgates))
    weights = (p.A, p.B, p.router_weight)
    flat = ForwardOperands(x, *weights, p.router_bias, None, base, None)
    run = cuda.prepare(flat, settings, inplace, p.base.shape)
    back = cuda.prepare_backward(flat, settings, p.x.shape)
    emulator.reset(0)
    y, u, g = run(tuple(flat._replace(x=p.x, base=p.base.clone())))
    emulator.reset(0)
    saved = BackwardOperands(p.dy, p.dgates, p.x, u, g, *weights, None)
    found = back(saved, needs)
    want = cuda_emulated.forward(flat._replace(base=base.clone()), settings, inplace)
    assert (y.shape, u.shape) == (p.base.shape, want[1].shape)
    for have, of in zip((y.view(want[0].shape), u, g), want, strict=True):
        assert torch.equal(have, of)
    wanted = cuda_emulated.backward(saved._replace(dy=dy, dgates=dgates, x=x), settings, needs)
    assert found[0].shape == p.x.shape
    for have, of in zip(found[:5], wanted[:5], strict=True):
        assert torch.equal(have.view(of.shape), of)
    assert back(saved._replace(dgates=None), (False,) * 6) == Gradients(*[None] * 6)
    by_columns = flat._replace(A=p.A.t().contiguous().t())
    assert cuda.prepare(by_columns, settings, inplace, y.shape) is None
