"""torch.func, second derivatives and tracing through an adapted model, plain LoRA beside it in each test."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, grad, jvp, vmap

from rode.tuner import RodeConfig

COMMON = dict(target_modules=["lin0", "lin1"])
CONFIGS = {
    "relu": RodeConfig(ranks=(2, 3), init_weights=False, dropout=0.0, **COMMON),
    "softmax": RodeConfig(
        ranks=(2, 3), gate="softmax", router_bias=True, init_weights=False, dropout=0.0, **COMMON
    ),
    "lora": LoraConfig(r=3, init_lora_weights=False, **COMMON),
}


@pytest.fixture(params=CONFIGS)
def model(request, mlp):
    torch.manual_seed(1)
    return get_peft_model(mlp(), CONFIGS[request.param]).eval()


@pytest.fixture
def x():
    return torch.randn(4, 3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model):
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    return lambda parameters, x: functional_call(model, {**frozen, **parameters}, (x,)).sin().sum()


def gradients(model, x):
    found = torch.autograd.grad(model(x).sin().sum(), [p for p in model.parameters() if p.requires_grad])
    return dict(zip(trained(model), found, strict=True))


def assert_close(found, want):
    for name, t in want.items():
        torch.testing.assert_close(found[name], t, rtol=1e-9, atol=1e-12, msg=name)


def test_gradients_of_each_sample(model, x):
    found = vmap(grad(loss_of(model)), in_dims=(None, 0))(trained(model), x)
    for i, sample in enumerate(x):
        assert_close({name: t[i] for name, t in found.items()}, gradients(model, sample))


def test_a_directional_derivative(model, x):
    parameters = trained(model)
    direction = {name: t.cos() for name, t in parameters.items()}
    _, found = jvp(lambda p: loss_of(model)(p, x), (parameters,), (direction,))
    want = sum((t * direction[name]).sum() for name, t in gradients(model, x).items())
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)


def test_forward_mode_with_respect_to_the_input(model, x):
    _, found = jvp(model, (x,), (x.cos(),))
    leaf = x.clone().requires_grad_()
    dy = torch.randn_like(found)
    (dx,) = torch.autograd.grad(model(leaf), leaf, dy)
    torch.testing.assert_close((found * dy).sum(), (dx * x.cos()).sum(), rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 0


def test_a_gradient_penalty(model, x):
    """The gradient of a gradient's norm, against finite differences along one direction."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def penalty():
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(model(leaf).sin().sum(), leaf, create_graph=True)
        return dx.square().sum()

    found = torch.autograd.grad(penalty(), parameters)
    step = [torch.randn_like(p) * 1e-6 for p in parameters]
    values = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, step, strict=True):
                p.add_(d, alpha=sign)
        values.append(penalty().item())
    want = (values[0] - values[1]) / 2
    assert sum((g * d).sum().item() for g, d in zip(found, step, strict=True)) == pytest.approx(
        want, rel=1e-4
    )


def test_a_trace_computes_the_same(model, x):
    traced = torch.jit.trace(model, (x,))
    other = x[:2, :2].flip(0)
    torch.testing.assert_close(traced(other), model(other), rtol=1e-10, atol=1e-12)
