"""Which configuration of a Triton kernel runs: none changes a bit, trials harm nothing, winners are kept for classes of shapes."""

from __future__ import annotations

import pytest
import torch

from mixture_oracle import operation, random_problem
from rode_kernels import rectified_mixture

pytest.importorskip("triton")

from rode_kernels.backends.triton import tune
from rode_kernels.backends.triton.device import interpreted

interpreter = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1 from the start")


@interpreter
@pytest.mark.usefixtures("sums_in_order")
@pytest.mark.parametrize("tokens", [20, pytest.param(150, marks=pytest.mark.slow)])
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
@pytest.mark.parametrize("tokens", [4, 100])
def test_trials_in_place_stay_within_their_memory(monkeypatch, tokens):
    """base is a part of something wider; what a trial writes to is a copy, with rows as far apart as its own."""
    p = random_problem((tokens,), K=64, O=48, dtype=torch.half)
    whole = torch.randn(tokens, 144).half()
    tried = []

    def with_trial(kernel, constants, shape_class, options, run, y, *, scratch=False):
        if scratch:
            run(trial := y.clone(), **options[0])  # packed, unlike y
            tried.append(trial)
        run(y, **options[0])

    monkeypatch.setattr(tune, "tuned", with_trial)
    before, base = whole.clone(), whole[:, 48:96]
    args = (p.x, p.A, p.B, p.router_weight, p.router_bias)
    kwargs = dict(ranks=p.ranks, scaling=p.scaling, backend="triton")
    y = rectified_mixture(*args, **kwargs, base=base, inplace=True)
    assert y is base
    assert torch.equal(tried[0], y)
    assert torch.equal(whole[:, :48], before[:, :48])
    assert torch.equal(whole[:, 96:], before[:, 96:])
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
