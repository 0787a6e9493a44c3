"""Calls that skip checks and dispatcher give what these would give, and raise what they would raise."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fast_calls import arguments, call, knows, the_long_way
from rode_kernels import backends, fast_path, functional
from rode_kernels.backends import cpu

pytestmark = [
    pytest.mark.skipif(not backends()["cpu"].available, reason="no native code"),
    pytest.mark.usefixtures("nothing_known"),
]

CASES = {
    "one token": dict(),
    "dropout": dict(tokens=(3, 2)),
    "three leading dimensions": dict(tokens=(2, 3, 4)),
    "no leading dimension": dict(tokens=()),
    "no base": dict(base=False),
    "no bias": dict(bias=False),
    "float64": dict(dtype=torch.float64),
    "bfloat16": dict(dtype=torch.bfloat16),
    "bfloat16 beside float32": dict(dtype=torch.bfloat16, parameter_dtype=torch.float32),
    "one output": dict(O=1, tokens=()),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_gives_what_the_long_way_gives(case, grad, inplace):
    leading, options = arguments(**CASES[case])
    if inplace and options["base"] is None:
        pytest.skip("nothing to write into")
    wanted = [t for t in (*leading, options["base"]) if t is not None]
    for t in wanted:
        t.requires_grad_(grad)

    if case == "dropout":
        options["dropout_p"] = 0.4

    def run(**changes):
        torch.manual_seed(0)  # of what is dropped
        base = options["base"] if options["base"] is None else options["base"] * 1
        y, g = call(leading, options, base=base, inplace=inplace, return_gates=True, **changes)
        assert not inplace or y is base
        grads = torch.autograd.grad(y.double().square().sum() + g.sum(), wanted) if grad else ()
        return y, g, *grads

    with the_long_way():
        wants = run()
    assert not fast_path._known
    for _ in range(2):
        for have, want in zip(run(), wants, strict=True):
            assert torch.equal(have, want)
            assert (have.shape, have.stride(), have.dtype) == (want.shape, want.stride(), want.dtype)
            assert have.requires_grad == want.requires_grad
        bias_in_16_bits = case == "bfloat16"  # is cast at each call: the long way
        assert sum(map(len, fast_path._known.values())) == (not bias_in_16_bits)


def test_y_alone_has_the_same_gradients():
    leading, options = arguments((3,))
    wanted = [t.requires_grad_() for t in (*leading, options["base"])]
    ways = [lambda y: y.square().sum(), lambda y: y.square().sum(), lambda y: (y * y.detach()).T.sum() * 2]
    with the_long_way():
        grads = [torch.autograd.grad(ways[0](call(leading, options)), wanted)]
    grads += [torch.autograd.grad(way(call(leading, options)), wanted) for way in ways]
    assert knows(leading, options)
    for later in grads[1:]:
        assert all(map(torch.equal, later, grads[0]))

    def second():
        (dx,) = torch.autograd.grad(call(leading, options).square().sum(), leading[0], create_graph=True)
        return torch.autograd.grad(dx.sum(), wanted)

    with the_long_way():
        want = second()
    assert all(map(torch.equal, second(), want))


@pytest.mark.parametrize("frozen", [False, True])
def test_inplace_into_what_a_frozen_layer_gave(frozen):
    leading, options = arguments((2, 3), bias=False)
    wanted = [t.requires_grad_() for t in leading[:4]] if not frozen else [leading[1].requires_grad_()]
    weight = torch.randn(20, 24, generator=torch.Generator().manual_seed(0))

    def grads(**changes):
        base = torch.nn.functional.linear(leading[0], weight)
        assert base.requires_grad != frozen
        y = call(leading, options, base=base, inplace=True, **changes)
        assert y is base
        return torch.autograd.grad(y.square().sum(), wanted)

    want = grads(backend="reference")
    assert not fast_path._known
    for _ in range(3):
        for have, good in zip(grads(), want, strict=True):
            torch.testing.assert_close(have, good, rtol=1e-4, atol=1e-4)
    assert [len(guards) for guards in fast_path._known.values()] == [1]


@pytest.mark.parametrize("dy", ["contiguous", "a stride of 0", "a transpose"])
@pytest.mark.parametrize("asked", [("x",), ("A", "router_bias"), ("B",), ("router_weight", "x")], ids=str)
def test_gradients_asked_for_are_those_of_the_long_way(asked, dy):
    leading, options = arguments((2, 3), dtype=torch.bfloat16, parameter_dtype=torch.float32)
    names = ("x", "A", "B", "router_weight", "router_bias")
    wanted = [t.requires_grad_() for name, t in zip(names, leading, strict=True) if name in asked]
    shape = options["base"].shape
    dy = {
        "contiguous": torch.randn(shape),
        "a stride of 0": torch.ones(()).expand(shape),
        "a transpose": torch.randn(shape[::-1]).permute(2, 1, 0),
    }[dy].bfloat16()
    dgates = torch.randn(2, 3, len(options["ranks"]))

    def grads(**changes):
        y, g = call(leading, options, return_gates=True, **changes)
        return torch.autograd.grad((y, g), wanted, (dy, dgates), retain_graph=True) + torch.autograd.grad(
            y, wanted, dy
        )

    want = grads(seed=0)  # which no call with is remembered
    assert not fast_path._known
    for _ in range(2):
        for have, good in zip(grads(), want, strict=True):
            assert torch.equal(have, good)
            assert have.dtype == good.dtype
            assert have.is_contiguous()
    assert knows(leading, options)


def test_gradients_follow_the_mode_and_not_the_first_call():
    leading, options = arguments()
    with torch.no_grad():
        call(leading, options)
    leading[1].requires_grad_()
    for _ in range(2):
        assert call(leading, options).requires_grad
        with torch.no_grad():
            assert not call(leading, options).requires_grad
        with torch.inference_mode():
            assert call(leading, options).is_inference()


def test_errors_are_the_same_after_a_good_call():
    leading, options = arguments((5,))
    for _ in range(2):
        call(leading, options)
    assert knows(leading, options)
    x, A, B, router, bias = leading
    bad = [
        ([x.double(), A, B, router, bias], {}, TypeError, "A: expected dtype torch.float64"),
        ([x, A.half(), B, router, bias], {}, TypeError, "A: expected dtype torch.float32"),
        ([x, A, B, router.to("meta"), bias], {}, ValueError, "router_weight: expected on cpu"),
        ([x, A[:, :-1], B, router, bias], {}, ValueError, "A: expected shape"),
        ([x, A, B, router[:-1], bias], {}, ValueError, "router_weight: expected shape"),
        ([x, A, B, router, bias[:-1]], {}, ValueError, "router_bias: expected shape"),
        ([x, A, B, router, bias], {"base": options["base"][:-1]}, ValueError, "base: expected shape"),
        ([x, A, B, router, bias], {"base": options["base"].half()}, TypeError, "base: expected dtype"),
        ([x, "A", B, router, bias], {}, TypeError, "A: expected a torch.Tensor, got str"),
        ([[1.0], A, B, router, bias], {}, TypeError, "x: expected a torch.Tensor, got list"),
        ([x, A, None, router, bias], {}, TypeError, "B: expected a torch.Tensor, got NoneType"),
        ([x, A, B, router, bias], {"ranks": (2.0, 4, 8, 16)}, TypeError, r"ranks\[0\]: expected an int"),
        ([x, A, B, router, bias], {"scaling": (1.0,)}, ValueError, "scaling: expected one float per expert"),
        ([x, A, B, router, bias], {"dropout_p": False}, TypeError, "dropout_p: expected a float"),
        ([x, A, B, router, bias], {"seed": 1.5}, TypeError, "seed: expected an int"),
        ([x, A, B, router, bias], {"backend": "tpu"}, ValueError, "backend: expected one of"),
    ]
    for leading, changes, error, message in bad:
        with pytest.raises(error, match=message):
            call(leading, options, **changes)


def test_inplace_is_checked_at_every_call():
    leading, options = arguments((5,), K=24, O=24)
    options["inplace"] = True
    for _ in range(2):
        call(leading, options)
    assert knows(leading, options)
    with pytest.raises(ValueError, match="base shares memory with x"):
        call(leading, options, base=leading[0])
    memory = torch.randn(9, 24)
    call([memory[:5], *leading[1:]], options)
    with pytest.raises(ValueError, match="base shares memory with x"):
        call([memory[:5], *leading[1:]], options, base=memory[4:])
    base = options["base"].requires_grad_()
    with pytest.raises(ValueError, match="base is a leaf tensor that needs grad"):
        call(leading, options, base=base)


@pytest.mark.parametrize("name", ["x", "A", "B", "router_weight", "base"])
def test_other_strides_are_other_calls(name):
    leading, options = arguments((3, 4))
    want = call(leading, options)
    names = ["x", "A", "B", "router_weight"]
    for restride in (
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]],
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        changed = list(leading)
        if name == "base":
            changes = {"base": restride(options["base"])}
        else:
            changed[names.index(name)] = restride(leading[names.index(name)])
            changes = {}
        for _ in range(2):
            torch.testing.assert_close(call(changed, options, **changes), want)


def test_threads_are_those_of_the_call(monkeypatch):
    leading, options = arguments((3,))
    given = []

    class Core:
        class ForwardArrays(cpu._native.ForwardArrays):
            def __call__(self, *addresses):
                given.append(addresses[-1])
                super().__call__(*addresses)

    monkeypatch.setattr(cpu, "_native", Core)
    cpu._forward_pass.cache_clear()
    before = torch.get_num_threads()
    try:
        for threads in (2, 1, 2):
            torch.set_num_threads(threads)
            call(leading, options)
    finally:
        torch.set_num_threads(before)
        cpu._forward_pass.cache_clear()
    assert given == [2, 1, 2]


def test_what_is_remembered_is_bounded(monkeypatch):
    """The oldest shapes and layouts are forgotten, and the latest known."""
    monkeypatch.setattr(fast_path, "_KEYS", 4)
    met = []
    for tokens in range(1, 20):
        met.append(arguments((tokens,)))
        call(*met[-1])
        assert all(knows(*one) for one in met[-4:])
        assert not any(knows(*one) for one in met[:-4])
        assert len(fast_path._known) <= 4
    leading, options = arguments((1, 5))
    for row in range(1, 20):  # one token whose distance to the next one is another each time
        x = torch.randn(1, 5, 24 + row)[..., :24]
        torch.testing.assert_close(call([x, *leading[1:]], options), call([x.clone(), *leading[1:]], options))
        assert knows([x, *leading[1:]], options)
    assert max(map(len, fast_path._known.values())) <= fast_path._GUARDS


WITHOUT = """
import sys, torch
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in repr(f)]  # an editable install would find the file
import rode_kernels
from rode_kernels import autograd, functional, gated_mixture, rectified_mixture
assert autograd.fast_path is None and "rode_kernels.fast_path" not in sys.modules
torch.manual_seed(0)
x, A, B, router, base = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 8), (6, 8), (5, 6), (2, 8), (2, 3, 5)))
gates = torch.randn(2, 3, 2, dtype=torch.float64).relu()
for t in (x, A, B, router, base, gates):
    t.requires_grad_()
options = dict(ranks=(2, 4), scaling=(8.0, 4.0))
factors = torch.tensor([8.0, 8.0, 4.0, 4.0, 4.0, 4.0], dtype=torch.float64)

def formula(g):
    return base + (x @ A.T * factors * g[..., [0, 0, 1, 1, 1, 1]]) @ B.T

for inplace in (False, True):
    for want, y, leaves in (
        (formula((x @ router.T).relu()),
         rectified_mixture(x, A, B, router, base=base * 1, inplace=inplace, **options), (x, A, B, router, base)),
        (formula(gates), gated_mixture(x, A, B, gates, base=base * 1, inplace=inplace, **options), (x, A, B, base)),
    ):
        dy = torch.randn_like(want)
        torch.testing.assert_close(y, want)
        for have, grad in zip(*(torch.autograd.grad(t, leaves, dy) for t in (y, want)), strict=True):
            torch.testing.assert_close(have, grad)
with torch.no_grad():
    torch.testing.assert_close(rectified_mixture(x, A, B, router, **options), formula((x @ router.T).relu()) - base)
print(rode_kernels.__file__)
"""


def test_the_package_works_without_the_file(tmp_path):
    """A copy of the package that lacks fast_path.py is slower, and gives the same values and gradients."""
    package = Path(functional.__file__).parent
    copy = shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "fast_path.py").unlink()
    run = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(str(tmp_path))
