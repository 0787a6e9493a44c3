"""The GPU backends on a device, `pytest -m gpu`: what only a device can show: its arithmetic, streams, graphs, several of them."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

import sibling_problems
from captured import as_cuda_graph, check_replays
from mixture_oracle import Problem, check, operation, random_problem, with_dropout
from rode_kernels import autograd, backends, fast_path, functional, rectified_mixture
from rode_kernels.backends.cuda import backend as cuda
from rode_kernels.backends.gpu.planner import prefer_gemm
from rode_kernels.backends.gpu.plans import ProblemShape
from rode_kernels.backends.reference import dropout_keep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["cuda", "triton"])
def backend(request) -> str:
    status = backends()[request.param]
    if not status.available:
        pytest.skip(status.reason)
    return request.param


def on_device(p: Problem, device: str = "cuda") -> Problem:
    return replace(
        p,
        **{f.name: v.to(device) for f in fields(p) if isinstance(v := getattr(p, f.name), torch.Tensor)},
    )


def run(p: Problem, x: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    return rectified_mixture(
        *(p.x if x is None else x, p.A, p.B, p.router_weight, p.router_bias),
        **{"ranks": p.ranks, "scaling": p.scaling, "base": p.base, **kwargs},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        dict(tokens=(1,), K=4096, O=4096),
        dict(tokens=(16,), K=4096, O=1024),
        dict(tokens=(300,), K=1000, O=520),
        dict(tokens=(16384,), K=1024, O=768),
        dict(tokens=(70,), K=101, O=77),
        dict(tokens=(2, 515), K=2048, O=512, ranks=(16,) * 16),
        dict(tokens=(40,), K=512, O=512, ranks=(16,) * 64),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [False, True])
def test_values(backend, dtype, shape, dropout):
    p = on_device(random_problem(dtype=dtype, **shape))
    if dropout:
        M, K = p.x.numel() // p.x.shape[-1], p.x.shape[-1]
        keep = dropout_keep(torch.tensor([5], device="cuda"), 0.1, M, K)
        p = with_dropout(p, keep, 0.1, 5)
    check(p, backend=backend)
    check(p, backend=backend, inplace=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        dict(tokens=(300,), K=1000, widths=(520, 128, 128), ranks=((2, 4, 8, 16),) * 3),
        dict(tokens=(8192,), K=1024, widths=(768, 512), ranks=((2, 4, 8, 16), (8,))),
        dict(tokens=(515,), K=2048, widths=(512, 256), ranks=((16,) * 16, (4,))),
        dict(tokens=(4096,), K=2048, widths=(2048, 2048), ranks=((8,) * 8, (8,) * 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout", [False, True])
def test_siblings(backend, dtype, shape, dropout):
    problems = sibling_problems.random_siblings(dtype=dtype, **shape)
    if dropout:
        problems = sibling_problems.with_dropout(problems, 0.1, list(range(5, 5 + len(problems))))
    x = problems[0].x.cuda()
    sibling_problems.check([replace(on_device(p), x=x) for p in problems], backend)


def test_many_given_gates_with_dropout_fit_the_shared_memory_of_the_device():
    if not backends()["cuda"].available:
        pytest.skip(backends()["cuda"].reason)
    most = torch.cuda.get_device_properties(0).shared_memory_per_block_optin
    assert cuda._native.max_shared(0) == most
    for ranks in ((1,) * 32, (32,) * 16):
        p = on_device(random_problem((16384,), K=64, O=64, ranks=ranks, router=False, dtype=torch.bfloat16))
        keep = dropout_keep(torch.tensor([5], device="cuda"), 0.1, 16384, 64)
        check(with_dropout(p, keep, 0.1, 5), backend="cuda")


@pytest.mark.parametrize("tokens", [1, 20, 16384])
def test_runs_have_the_same_bits_and_never_wait_for_the_host(backend, tokens):
    p = on_device(random_problem((tokens,), K=512, O=512, dtype=torch.bfloat16))
    first = run(p, backend=backend, dropout_p=0.1, seed=3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        others = [run(p, backend=backend, dropout_p=0.1, seed=3) for _ in range(10)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("tokens", [16, 20, 16384])
def test_configurations_of_triton_kernels_change_no_bit(monkeypatch, tokens):
    """All that tuning may choose for a call, each forced for every kernel."""
    if not backends()["triton"].available:
        pytest.skip(backends()["triton"].reason)
    from rode_kernels.backends.triton import tune

    p = on_device(random_problem((tokens,), K=520, O=1000, dtype=torch.bfloat16))
    options = tune.of_forward(1 << (tokens - 1).bit_length(), 2, 32)
    results = []
    for option in options:
        monkeypatch.setattr(tune, "forced", option)
        results.append(operation(p, backend="triton"))
    for other in results[1:]:
        assert torch.equal(other.y, results[0].y)
        for name, grad in results[0].grads.items():
            assert torch.equal(grad, other.grads[name]), name


@pytest.mark.parametrize("tokens", [1, 20, 16384])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_captured_call_replays(backend, tokens, inplace):
    p = on_device(random_problem((tokens,), K=256, O=256, dtype=torch.bfloat16))
    x = p.x.clone()
    run(p, x, backend=backend)  # loads the kernels
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(p, x, base=p.base * 1, inplace=inplace, backend=backend)
    for factor in (1.0, -2.0):
        x.copy_(p.x * factor)
        graph.replay()
        assert torch.equal(y, run(p, p.x * factor, backend=backend))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [(2, 4, 8, 16), (16,) * 8], ids=str)
def test_both_passes_captured_together_replay(backend, ranks, dtype, dropout_p, inplace):
    """The kernels, and the gemm path for the wide mixture: in a graph PyTorch's products may add up in another order."""
    tokens, K, O = 300, 256, 256
    p = on_device(random_problem((tokens,), K=K, O=O, ranks=ranks, dtype=dtype, dropout_p=dropout_p))
    shape = ProblemShape(tokens, K, O, sum(ranks), len(ranks), dtype.itemsize, dropout=dropout_p > 0.0)
    by_gemm = any(prefer_gemm(shape, back, triton=backend == "triton") for back in (False, True))
    if not dropout_p:
        assert by_gemm == (len(ranks) == 8)
    check_replays(p, as_cuda_graph, backend=backend, inplace=inplace, same_bits=not by_gemm)


def test_the_current_stream_is_used(backend):
    p = on_device(random_problem((4096,), K=1024, O=1024, dtype=torch.bfloat16))
    want, x = run(p, backend=backend), torch.zeros_like(p.x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream sees zeros
        x.copy_(p.x)
        y = run(p, x, backend=backend)
    stream.synchronize()
    assert torch.equal(y, want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_the_device_is_that_of_the_tensors(backend):
    p = random_problem((100,), K=256, O=256, dtype=torch.bfloat16)
    want = run(on_device(p, "cuda:0"), backend=backend)
    with torch.cuda.device(0):
        got = run(on_device(p, "cuda:1"), backend=backend)
        assert torch.cuda.current_device() == 0
    assert got.device == torch.device("cuda:1")
    assert torch.equal(got.cpu(), want.cpu())


def test_float64_goes_to_the_reference_with_a_warning():
    p = on_device(random_problem((5,), dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="the GPU kernels take float32"):
        run(p)


@pytest.mark.parametrize("ranks", [(2, 4, 8, 16), (16,) * 8], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("parameter_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_fast_path_gives_the_same_bits(monkeypatch, ranks, inplace, parameter_dtype, dropout_p):
    """Through autograd and without, by the kernels and by the gemm path."""
    if not backends()["cuda"].available:
        pytest.skip(backends()["cuda"].reason)
    monkeypatch.setattr(fast_path, "_known", {})
    p = on_device(
        random_problem(
            (2, 9),
            K=136,
            O=72,
            ranks=ranks,
            bias=False,
            dtype=torch.bfloat16,
            parameter_dtype=parameter_dtype,
        )
    )
    leaves = [p.x, p.A, p.B, p.router_weight]

    def both() -> list[torch.Tensor]:
        found = []
        for grad in (False, True):
            torch.manual_seed(0)
            for t in leaves:
                t.requires_grad_(grad)
            y, gates = run(p, base=p.base * 1, inplace=inplace, dropout_p=dropout_p, return_gates=True)
            found += [y.detach(), gates.detach()]
            if grad:
                found += torch.autograd.grad([y, gates], leaves, [p.dy, gates.detach()])
        return found

    with monkeypatch.context() as patch:
        for module in (functional, autograd):
            patch.setattr(module, "fast_path", None)
        wants = both()
    assert not fast_path._known
    for _ in range(2):
        for have, want in zip(both(), wants, strict=True):
            assert torch.equal(have, want)
            assert (have.shape, have.stride(), have.dtype) == (want.shape, want.stride(), want.dtype)
        assert sum(map(len, fast_path._known.values())) == 2
