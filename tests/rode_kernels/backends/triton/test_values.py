"""The Triton backend beyond the conformance suite: launches, what they move, the interpreter, devices.

The suite itself runs on the interpreter (TRITON_INTERPRET=1, which `make test` sets).
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from mixture_oracle import check, operation, random_problem
from rode_kernels import backends, rectified_mixture
from rode_kernels.backends.triton import backend as triton_backend
from rode_kernels.mixture import make_mixture
from sass import ROOT

pytest.importorskip("triton")

from rode_kernels.backends.triton import launch_backward, tune
from rode_kernels.backends.triton import record as triton_launches
from rode_kernels.backends.triton.device import interpreted

interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 from the start")


@pytest.mark.parametrize(
    ("tokens", "ranks", "forward"),
    [
        (8192, (2, 4, 8, 16), ["fused"]),
        (8192, (64,), ["fused"]),
        (1, (2, 4, 8, 16), ["shrink", "expand"]),
        (8192, (16,) * 16, ["shrink", "expand"]),
    ],
    ids=str,
)
def test_launches(tokens, ranks, forward):
    """Forward one where tiles of tokens fill the device, else two; backward three and the one that adds ranges."""
    launches = triton_launches.record(torch.bfloat16, tokens=tokens, ranks=ranks)
    backward = ["grad_output_pass", "gate_backward", "grad_input_pass", "reduce_partials"]
    assert [one.kernel.fn.__name__ for one in launches] == [*forward, *backward]


@interpreter
@pytest.mark.parametrize(
    "call",
    [
        dict(tokens=300),
        dict(tokens=16, ranks=(4, 4)),
        dict(tokens=200, ranks=(40, 40)),
        dict(tokens=200, ranks=(64,)),
        dict(tokens=150, ranks=(300, 5)),
        dict(tokens=300, gated=True),
        dict(tokens=200, without_dy=True),
        dict(tokens=200, needs=(False, False, True, False, True, False)),
        dict(tokens=200, siblings=2),
        dict(tokens=200, siblings=2, dropout_p=0.3),
        dict(tokens=130, siblings=3, dropout_p=0.3, ranks=(40, 40)),
    ],
    ids=str,
)
def test_what_programs_move_is_what_the_traffic_table_says(monkeypatch, call):
    """Elements that the interpreter loads and stores, against the formulas; all gates open."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting_load(self, ptrs, mask, *args):
        result = load(self, ptrs, mask, *args)
        counted[-1] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return result

    def counting_store(self, ptrs, value, mask, *args):
        counted[-1] += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
        return store(self, ptrs, value, mask, *args)

    class Both(triton_launches.Recorder):
        def __getitem__(self, grid):
            def both(*args, **kwargs):
                counted.append(0)
                self.kernel[grid](*args, **kwargs)
                triton_launches.Recorder.__getitem__(self, grid)(*args, **kwargs)

            return both

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counting_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counting_store)
    launches = triton_launches.record(
        torch.half, **{"K": 320, "O": 448, **call}, multiprocessors=4, device_type="cpu", recorder=Both
    )
    assert len(launches) == len(counted)
    for launch, moved in zip(launches, counted, strict=True):
        said = triton_launches.cost_of([launch], 2).l2
        assert said == pytest.approx(moved, rel=0.015), launch.kernel.fn.__name__


@pytest.mark.parametrize("dropout_p", [0.0, 0.05])
def test_traffic_of_q_and_v_against_two_calls(dropout_p):
    """DRAM, by the formulas."""
    call = dict(tokens=8192, dropout_p=dropout_p)
    alone = triton_launches.record(torch.bfloat16, **call)
    together = triton_launches.record(torch.bfloat16, **call, siblings=2)
    ratios = []
    for kernels in (("fused", "shrink", "expand"), ("grad_output_pass", "gate_backward", "grad_input_pass")):
        of_two, of_one = (
            triton_launches.cost_of([one for one in launches if one.kernel.fn.__name__ in kernels], 2).dram
            for launches in (together, alone)
        )
        ratios.append(of_two / (2 * of_one))
    print(f"dropout {dropout_p}: forward {ratios[0]:.3f}, backward {ratios[1]:.3f}")
    assert ratios[0] <= 0.86
    assert ratios[1] <= 0.75


@interpreter
def test_what_programs_move_with_many_tokens(monkeypatch):
    monkeypatch.setattr(launch_backward, "MANY_TOKENS", 1)
    test_what_programs_move_is_what_the_traffic_table_says(monkeypatch, dict(tokens=100, O=2048))


@interpreter
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_with_many_tokens_a_program_takes_several_blocks_of_y(monkeypatch, router):
    """Parts of t are then added up by the program itself, through memory; the last of its blocks may not exist."""
    monkeypatch.setattr(launch_backward, "MANY_TOKENS", 1)
    for O, gate_grad in ((2048, "open"), (2200, "all")):
        p = random_problem((70,), K=40, O=O, dtype=torch.half, router=router)
        if not router:
            p.gate_grad = gate_grad
        check(p, backend="triton")


@interpreter
@pytest.mark.usefixtures("sums_in_order")
def test_operands_cast_for_the_interpreter_are_its_only_exception(monkeypatch):
    """INTERPRETED is read in one place, and where the interpreter multiplies rightly (float16) it changes no bit."""
    from rode_kernels.backends.triton import tiles as blocks

    sources = "\n".join(
        path.read_text() for path in sorted((ROOT / "rode_kernels/backends/triton").glob("*.py"))
    )
    assert re.findall(r"^.*if .*INTERPRETED.*$", sources, re.MULTILINE) == ["    if INTERPRETED:"]
    p = random_problem((70,), K=100, O=80, dtype=torch.half)
    with_casts = operation(p, backend="triton")
    monkeypatch.setattr(blocks, "interpreted", lambda: False)
    without = operation(p, backend="triton")
    assert torch.equal(with_casts.y, without.y)
    for name, grad in with_casts.grads.items():
        assert torch.equal(grad, without.grads[name]), name


@pytest.mark.parametrize("value", ["1", "true", "True", "YES", "on", "y", "0", "", "off", "t"])
def test_the_interpreter_is_on_where_triton_thinks_so(monkeypatch, value):
    import triton

    monkeypatch.setenv("TRITON_INTERPRET", value)
    interpreted.cache_clear()
    try:
        assert interpreted() == triton.knobs.runtime.interpret
        assert triton_backend.devices() == (("cpu",) if interpreted() else ("cuda",))
    finally:
        monkeypatch.undo()
        interpreted.cache_clear()


class Elsewhere:
    """Of a tensor on a GPU, what decides whether Triton serves it."""

    device, dtype, shape = torch.device("cuda"), torch.float32, (4, 8)

    @staticmethod
    def numel() -> int:
        return 32


def test_old_gpus_are_refused_with_the_reason(monkeypatch):
    mixture = make_mixture((4,), (1.0,))
    monkeypatch.setattr(triton_backend, "devices", lambda: ("cuda",))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert (
        triton_backend.refuses(Elsewhere, 8, mixture)
        == "Triton takes compute capability 8.0 and newer, got 7.5"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert triton_backend.refuses(Elsewhere, 8, mixture) == ""
    monkeypatch.setattr(triton_backend, "devices", lambda: ("cpu",))
    assert triton_backend.refuses(Elsewhere, 8, mixture) == "Triton, interpreted, serves cpu tensors"


@pytest.mark.parametrize(
    ("arch", "takes"), [("", "tf32"), ("gfx942:sramecc+:xnack-", "tf32"), ("gfx1100", "ieee")]
)
def test_tf32_is_asked_for_where_the_device_has_it(monkeypatch, arch, takes):
    monkeypatch.setattr(tune.device, "amd", lambda: bool(arch))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch))
    assert tune.device.precision(torch.zeros(1)) == "ieee"
    monkeypatch.setattr(tune.device, "tf32_allowed", lambda: True)
    assert tune.device.precision(torch.zeros(1)) == takes
    assert tune.device.precision(torch.zeros(1, dtype=torch.half)) == "ieee"


@interpreter
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.half], ids=str)
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_sweep_of_many_columns(dtype, router):
    """Every K and every M, each with most mixtures; of all three together the interpreter would take too long."""
    mixtures = ((1,), (2, 4, 8, 16), (33, 31), (33, 31, 5), (7,) * 20, (90,) * 3)
    for i, K in enumerate((15, 16, 63, 64, 65, 130, 257)):
        for j, M in enumerate((1, 16, 17, 64, 130)):
            ranks = mixtures[(i + 2 * j + 3 * router) % 6]
            p = random_problem((M,), K=K, O=K % 50 + 30, ranks=ranks, dtype=dtype, router=router, seed=K + M)
            check(p, backend="triton", inplace=bool(M % 2))


@interpreter
def test_it_agrees_with_the_cuda_kernels():
    if not backends()["cuda-emulated"].available:
        pytest.skip("needs the emulator")
    p = random_problem((80,), K=128, O=96, dtype=torch.bfloat16)
    args = (p.x, p.A, p.B, p.router_weight, p.router_bias)
    kwargs = dict(ranks=p.ranks, scaling=p.scaling, base=p.base, dropout_p=0.3, seed=11)
    mine, other = (rectified_mixture(*args, **kwargs, backend=name) for name in ("triton", "cuda-emulated"))
    scale = other.abs().max()
    assert (mine.float() - other.float()).abs().max() <= 2**-7 * scale
