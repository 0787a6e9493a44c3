"""The Triton backend beyond the conformance suite: code for GPUs that are not here, launches, tuning, the interpreter.

The suite itself runs on the interpreter (TRITON_INTERPRET=1, which `make test` sets). Compilation needs it off: another process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mixture_oracle import check, operation, random_problem
from rode_kernels import backends, rectified_mixture
from rode_kernels import triton as triton_backend
from rode_kernels.mixture import make_mixture
from sass import ROOT, cuobjdump

pytest.importorskip("triton")

from rode_kernels.triton import interpreted, launch_backward, tune

TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx1100")
SHARED_KIB = dict(zip(TARGETS, (163, 99, 227, 227, 99, 64, 64), strict=True))  # that a block can have
interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 from the start")


def compiled(program: list[str]) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])
    run = subprocess.run(
        [sys.executable, *program], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def spills_allowed(report: dict, kind: str) -> int:
    """A handful that ptxas takes by itself, far from the last register, so that more programs fit a multiprocessor. Any number in a
    case of no real size, and where dropout meets rows that 4 does not divide, which is slow."""
    if report["case"] in ("ones", "dropout on ragged rows"):
        return 1 << 30
    return 8 if report["registers"] < 128 else 0


def check_code(kind: str, targets: tuple[str, ...]) -> None:
    kernels = defaultdict(set)
    for report in compiled(["tests/support/triton_code.py", kind, "calls", *targets]):
        where = f"{report['kernel']} ({report['case']}) for {kind} on {report['target']}: {report}"
        kernels[report["target"]].add(report["kernel"])
        assert report["spills"] <= spills_allowed(report, kind), where
        assert report["shared"] <= SHARED_KIB[report["target"]] * 1024, where
        assert report["registers"] <= (512 if report["target"] == "gfx942" else 256), where
        if (
            kind != "float"
        ):  # every product of 16-bit values; float32 without tf32 has no matrix instruction on most of them
            assert report["left"] == report["left_wide"] == 0, where
            assert report["matrix"] >= report["narrow_dots"], where
        else:
            assert report["narrow_dots"] == 0, where
    everything = {"fused", "shrink", "expand", "through_y", "through_v", "through_x", "add"}
    assert kernels == dict.fromkeys(targets, everything)


needs_cuobjdump = pytest.mark.skipif(
    cuobjdump() is None, reason="needs cuobjdump, as Triton's Linux wheel has it"
)


@needs_cuobjdump
def test_code_for_an_nvidia_and_an_amd_gpu():
    check_code("bf16", ("sm_90", "gfx942"))


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "f16", "float"])
def test_code_for_every_gpu(kind):
    check_code(kind, TARGETS)


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "float"])
def test_code_of_every_configuration(kind):
    """What tuning may choose compiles and fits everywhere; a few spills are weighed by its measurement."""
    reports = compiled(["tests/support/triton_code.py", kind, "choices", *TARGETS])
    assert {r["kernel"] for r in reports} >= {"fused", "shrink", "expand", "through_y", "through_x"}
    for report in reports:
        assert report["spills"] <= 16, report
        assert report["shared"] <= SHARED_KIB[report["target"]] * 1024, report


LAUNCHES = """
import json, torch
from rode_kernels.triton.launches import record
for M, ranks in ((8192, (2, 4, 8, 16)), (1, (2, 4, 8, 16)), (8192, (16,) * 16), (8192, (64,))):
    print(json.dumps([l.kernel.__name__ for l in record(torch.bfloat16, tokens=M, ranks=ranks)]))
"""


def test_launches():
    """Forward one where tiles of tokens fill the device, else two; backward three and the one that adds ranges."""
    backward = ["through_y", "through_v", "through_x", "add"]
    full, few, wide, one_wide = compiled(["-c", LAUNCHES])
    assert full == one_wide == ["fused", *backward]
    assert few == wide == ["shrink", "expand", *backward]


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
    ],
    ids=str,
)
def test_what_programs_move_is_what_the_traffic_table_says(monkeypatch, call):
    """Elements that the interpreter loads and stores, against the formulas; all gates open."""
    from triton.runtime.interpreter import InterpreterBuilder

    from rode_kernels.triton import launches as triton_launches

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


@interpreter
def test_what_programs_move_with_many_tokens(monkeypatch):
    monkeypatch.setattr(launch_backward, "MANY_TOKENS", 1)
    test_what_programs_move_is_what_the_traffic_table_says(monkeypatch, dict(tokens=100, O=2048))


@pytest.fixture
def sums_in_order(monkeypatch):
    """The interpreter's products are numpy's, which picks an order of summation by shape. Here k after k, as a GPU does."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(total.dtype) * b.data[None, k].astype(total.dtype)
        return TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


@interpreter
@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("tokens", [20, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.half], ids=str)
def test_configurations_change_no_bit(monkeypatch, tokens, dtype):
    p = random_problem((tokens,), K=200, O=150, dtype=dtype)
    results = []
    for config in tune.CONFIGS:
        monkeypatch.setattr(tune, "forced", tune._options(config, without=""))
        results.append(operation(p, backend="triton"))
    for other in results[1:]:
        assert torch.equal(other.y, results[0].y)
        for name, grad in results[0].grads.items():
            assert torch.equal(grad, other.grads[name]), name


@pytest.mark.parametrize("amd", [False, True])
def test_configurations_are_few_and_pruned(monkeypatch, amd):
    monkeypatch.setattr(tune.device, "amd", lambda: amd)
    for configs in (tune.CONFIGS, tune.WIDE_CONFIGS):
        assert len(set(configs)) == len(configs) <= 12
    for tokens in (1, 16, 64, 131072):
        for element_size in (2, 4):
            for columns, passes in ((32, 1), (64, 1), (64, 4), (256, 1)):
                for without in ("", "BLOCK_O"):
                    options = tune.of_forward(tokens, element_size, columns, passes, without)
                    assert options, (tokens, element_size, columns, passes)
                    assert all(o["BLOCK_M"] <= max(16, tokens) for o in options)
                    assert element_size == 2 or all(o["BLOCK_M"] <= 32 for o in options)
                    assert len({min(o["BLOCK_M"], 64) for o in options}) == 1  # one matrix instruction
                    assert [o for i, o in enumerate(options) if o in options[:i]] == []
                    assert all(without not in o for o in options)
                    assert not amd or all(o["num_stages"] <= 2 for o in options)


class FakeDevice:
    """Counts trials, and finds the third configuration fastest."""

    def __init__(self, monkeypatch):
        self.trials, self.ran = 0, []
        monkeypatch.setattr(tune, "interpreted", lambda: False)
        monkeypatch.setattr(tune.device, "capturing", lambda y: False)
        monkeypatch.setattr(tune, "_winners", {})
        monkeypatch.delenv("RODE_TRITON_AUTOTUNE", raising=False)
        monkeypatch.setattr(tune.triton.testing, "do_bench", self.bench)

    def bench(self, call, **_):
        self.trials += 1
        call()
        return 1.0 if self.trials == 3 else 2.0

    def call(self, tokens: int, y: torch.Tensor, scratch: bool = False, **constants) -> dict:
        def run(to: torch.Tensor, **options) -> None:
            to += 1.0
            self.ran.append(options)

        most = 1 << (tokens - 1).bit_length()
        options = tune.of_forward(most, 2, 32)
        tune.tuned("fused", constants, ("a shape", most), options, run, y, scratch=scratch)
        return self.ran[-1]


def test_the_fastest_is_kept_for_a_shape_class_and_not_for_a_number_of_tokens(monkeypatch):
    device, y = FakeDevice(monkeypatch), torch.zeros(4, dtype=torch.bfloat16)
    options = tune.of_forward(128, 2, 32)
    assert device.call(100, y) == options[2]
    assert device.trials == len(options)
    assert device.call(128, y) == device.call(65, y) == options[2]
    assert device.trials == len(options)
    device.call(129, y)
    assert device.trials == len(options) + len(tune.of_forward(256, 2, 32))
    before = device.trials
    device.call(100, y, DROPOUT=True)  # another kernel, for the compiler
    assert device.trials == before + len(options)


def test_trials_do_not_add_to_base_in_place(monkeypatch):
    device, y = FakeDevice(monkeypatch), torch.zeros(4, dtype=torch.bfloat16)
    device.call(100, y, scratch=True)
    assert (y == 1.0).all()


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
@pytest.mark.parametrize("tokens", [4, 100])
def test_trials_in_place_stay_within_their_memory(monkeypatch, tokens):
    """base is a part of something wider; what a trial writes to is a copy, with rows as far apart as its own."""
    p = random_problem((tokens,), K=64, O=48, dtype=torch.half)
    wide = torch.randn(tokens, 144).half()
    tried = []

    def with_trial(kernel, constants, shape_class, options, run, y, *, scratch=False):
        if scratch:
            run(trial := y.clone(), **options[0])  # packed, unlike y
            tried.append(trial)
        run(y, **options[0])

    monkeypatch.setattr(tune, "tuned", with_trial)
    before, base = wide.clone(), wide[:, 48:96]
    args = (p.x, p.A, p.B, p.router_weight, p.router_bias)
    kwargs = dict(ranks=p.ranks, scaling=p.scaling, backend="triton")
    y = rectified_mixture(*args, **kwargs, base=base, inplace=True)
    assert y is base
    assert torch.equal(tried[0], y)
    assert torch.equal(wide[:, :48], before[:, :48])
    assert torch.equal(wide[:, 96:], before[:, 96:])
    assert torch.equal(y, rectified_mixture(*args, **kwargs, base=before[:, 48:96].contiguous()))


def test_trials_that_find_no_memory_leave_the_choice_to_the_rule(monkeypatch):
    device, y = FakeDevice(monkeypatch), torch.zeros(4, dtype=torch.bfloat16)

    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("no 256 MB")

    monkeypatch.setattr(tune.triton.testing, "do_bench", no_room)
    assert device.call(100, y) == tune.of_forward(128, 2, 32)[0]
    assert tune._winners == {}  # another call may find some


@interpreter
def test_tuning_goes_by_classes_of_tokens_whatever_the_strides_of_dy(monkeypatch):
    keys = set()

    def note(kernel, constants, shape_class, options, run, y, *, scratch=False):
        keys.add((kernel, tuple(constants.items()), shape_class))
        run(y, **options[0])

    monkeypatch.setattr(tune, "tuned", note)
    counts = []
    for tokens in (33, 49, 50, 61):  # of which 16 divides none: those that it divides compile apart
        p = random_problem((tokens,), K=32, O=48, dtype=torch.half)
        p.dy = p.dy.t().contiguous().t()
        operation(p, backend="triton")
        counts.append(len(keys))
    assert counts == counts[:1] * 4


def test_tuning_can_be_switched_off(monkeypatch):
    device, y = FakeDevice(monkeypatch), torch.zeros(4, dtype=torch.bfloat16)
    monkeypatch.setenv("RODE_TRITON_AUTOTUNE", "off")
    assert device.call(100, y) == tune.of_forward(128, 2, 32)[0]
    monkeypatch.setenv("RODE_TRITON_AUTOTUNE", "no")
    with pytest.raises(ValueError, match="RODE_TRITON_AUTOTUNE: expected on or off, got 'no'"):
        device.call(100, y)
    monkeypatch.delenv("RODE_TRITON_AUTOTUNE")
    monkeypatch.setattr(tune.device, "capturing", lambda y: True)
    device.call(100, y)
    assert device.trials == 0


def test_a_kernel_that_cannot_be_captured_says_what_to_do(monkeypatch):
    monkeypatch.setattr(tune.device, "capturing", lambda y: True)

    def run(y, **options):
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(
        RuntimeError, match=r"'fused' could not be captured .* run the call once before"
    ) as caught:
        tune.tuned("fused", {}, (), tune.of_backward(8), run, torch.zeros(1))
    assert "not permitted" in str(caught.value.__cause__)


@interpreter
@pytest.mark.usefixtures("sums_in_order")
def test_operands_cast_for_the_interpreter_are_its_only_exception(monkeypatch):
    """INTERPRETED is read in one place, and where the interpreter multiplies rightly (float16) it changes no bit."""
    from rode_kernels.triton import blocks

    sources = "\n".join(path.read_text() for path in sorted((ROOT / "rode_kernels/triton").glob("*.py")))
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.half, torch.bfloat16], ids=str)
@pytest.mark.parametrize("router", [True, False], ids=["rectified", "gated"])
def test_wide_sweep(dtype, router):
    for K in (15, 16, 63, 64, 65, 130, 257):
        for M in (1, 16, 17, 64, 130):
            for ranks in ((1,), (2, 4, 8, 16), (33, 31), (33, 31, 5), (7,) * 20, (90,) * 3):
                p = random_problem(
                    (M,), K=K, O=K % 50 + 30, ranks=ranks, dtype=dtype, router=router, seed=K + M
                )
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
