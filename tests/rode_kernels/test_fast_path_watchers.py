"""Whatever watches the operator, or changes what it would do, still sees calls that could skip checks and dispatcher."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fast_calls import arguments, call, knows
from rode_kernels import backends, fast_path

pytestmark = [
    pytest.mark.skipif(not backends()["cpu"].available, reason="no native code"),
    pytest.mark.usefixtures("nothing_known"),
]


def test_backend_and_environment_are_read_at_every_call(monkeypatch):
    leading, options = arguments()
    for _ in range(2):
        call(leading, options)
    assert knows(leading, options)
    assert not knows(leading, options, "cpu")  # another name, another call
    call(leading, options, backend="cpu")
    assert knows(leading, options, "cpu")
    assert not knows(leading, options, "reference")
    monkeypatch.setenv("RODE_BACKEND", "tpu")
    with pytest.raises(ValueError, match="RODE_BACKEND: expected one of"):
        call(leading, options)
    monkeypatch.setenv("RODE_BACKEND", "reference")
    assert not knows(leading, options)
    monkeypatch.delenv("RODE_BACKEND")
    assert knows(leading, options)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Looking(Dispatched):
    """A mode that Dynamo's guards look past, as they do for selective checkpointing's."""

    @classmethod
    def ignore_compile_internals(cls):
        return True


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("mode", [Dispatched, Looking, Functions])
def test_modes_see_the_operator(mode, grad):
    leading, options = arguments()
    leading[1].requires_grad_(grad)
    with mode() as first:
        call(leading, options)
    assert not knows(leading, options), "what a mode saw is no call that nobody watches"
    call(leading, options)
    assert knows(leading, options)
    with mode() as second:
        assert not knows(leading, options)
        call(leading, options)
    assert any("rode.mixture" in name for name in second.seen)
    assert second.seen == first.seen
    assert knows(leading, options)


def test_a_mode_sees_the_backward_operator():
    leading, options = arguments()
    leading[1].requires_grad_()
    (plain,) = torch.autograd.grad(call(leading, options).sum(), leading[1])
    loss = call(leading, options).sum()
    with Dispatched() as mode:
        (watched,) = torch.autograd.grad(loss, leading[1])
    assert any("rode.mixture_backward" in name for name in mode.seen)
    assert torch.equal(plain, watched)


def test_tracers_and_transforms_see_the_operator():
    from torch.fx.experimental.proxy_tensor import make_fx

    leading, options = arguments((3,))
    x, *rest = leading
    for _ in range(2):
        want = call(leading, options)

    def of_x(x):
        return call([x, *rest], options)

    graph = make_fx(of_x)(x)
    assert torch.ops.rode.mixture.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(x), want)
    traced = torch.jit.trace(of_x, x, check_trace=False)
    assert "rode::mixture" in str(traced.graph)
    with torch.profiler.profile() as profile:
        of_x(x)
    assert "rode::mixture" in {event.key for event in profile.key_averages()}
    assert knows(leading, options)
    leaf = x.clone().requires_grad_()
    (want,) = torch.autograd.grad(of_x(leaf).sum(), leaf)
    torch.testing.assert_close(torch.func.grad(lambda x: of_x(x).sum())(x), want)


def test_autocast_is_not_skipped():
    leading, options = arguments((3,), dtype=torch.float32)
    for _ in range(2):
        call(leading, options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert call(leading, options).dtype == torch.bfloat16
    assert call(leading, options).dtype == torch.float32


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_where_autocast_has_nothing_to_cast_it_is_no_watcher(grad, inplace):
    """x in its type and parameters in float32, as in training."""
    leading, options = arguments((3,), dtype=torch.bfloat16, parameter_dtype=torch.float32)
    wanted = [t.requires_grad_(grad) for t in (*leading, options["base"])]

    def run():
        y, g = call(leading, options, base=options["base"] * 1, inplace=inplace, return_gates=True)
        return y, g, *(torch.autograd.grad(y.float().square().sum() + g.sum(), wanted) if grad else ())

    without = run()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = run()
        known = sum(map(len, fast_path._known.values()))
        assert known == 2  # without autocast, and with
        second = run()
    assert sum(map(len, fast_path._known.values())) == known
    for have in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(have, without, strict=True))


def test_what_autocast_would_cast_takes_the_long_way():
    leading, options = arguments((3,), dtype=torch.bfloat16, parameter_dtype=torch.float32)
    other, others = arguments((3,), dtype=torch.bfloat16, parameter_dtype=torch.bfloat16)
    options["base"] = others["base"] = None
    for parameters in (leading, [leading[0], *(t.half() for t in other[1:4]), leading[4]]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            first = call(parameters, options)
            assert torch.equal(call(parameters, options), first)
            assert knows(parameters, options) == (parameters is leading)
        with torch.autocast("cpu", dtype=torch.float16):
            assert not knows(parameters, options)
            assert call(parameters, options).dtype == torch.float16


@pytest.mark.parametrize("moved_first", [False, True])
def test_what_hooks_bring_back_in_other_strides_is_read_by_them(moved_first):
    """x and B are slices; a hook saves them contiguously, as one does that moves them to another memory."""
    (x, A, B, *router), options = arguments((5,))
    x, B = torch.cat([x, x, x], 1)[:, 3 : 3 + x.shape[1]], torch.stack([B, B], 2)[..., 0]
    leading = [x, A, B, *router]
    leaves = [t.requires_grad_() for t in leading]

    def gradients(moved):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.contiguous().clone() if moved else t, lambda t: t
        ):
            y = call(leading, options)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    want = torch.autograd.grad(call(leading, options, backend="reference"), leaves, torch.ones(5, 20))
    call(leading, options)
    assert knows(leading, options)
    for moved in (moved_first, not moved_first) * 2:
        for have, of in zip(gradients(moved), want, strict=True):
            # as much as two orders of one sum may differ, on any processor
            rounding = 32 * torch.finfo(of.dtype).eps * of.abs().max().item()
            torch.testing.assert_close(have, of, rtol=0, atol=rounding)


def test_subclasses_and_unusual_tensors_take_the_long_way():
    class Own(torch.Tensor):
        pass

    leading, options = arguments((3,))
    want = call(leading, options)
    assert knows(leading, options)
    own = leading[0].as_subclass(Own)
    assert not knows([own, *leading[1:]], options)
    assert type(call([own, *leading[1:]], options)) is Own
    negated = torch.complex(torch.zeros(3, 24), -leading[0]).conj().imag  # x, by a bit that says: negative
    assert negated.is_neg()
    for _ in range(2):
        assert torch.equal(call([negated, *leading[1:]], options), want)
        assert not knows([negated, *leading[1:]], options)


def test_dynamo_traces_the_operator():
    torch._dynamo.reset()
    leading, options = arguments((3,))
    want = call(leading, options)
    targets = []

    def backend(module, _inputs):
        targets.extend(str(node.target) for node in module.graph.nodes)
        return module.forward

    compiled = torch.compile(lambda x: call([x, *leading[1:]], options), fullgraph=True, backend=backend)
    for _ in range(2):
        assert torch.equal(compiled(leading[0]), want)
    assert any("rode.mixture" in target for target in targets)
