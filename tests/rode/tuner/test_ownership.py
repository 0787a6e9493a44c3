"""The base layer's output belongs to whoever may hold it: nothing is written into it then, and gradients are plain PyTorch's."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from rode.tuner import RodeConfig

aten = torch.ops.aten
PRODUCTS = [aten.mm.default, aten.addmm.default, aten.linear.default]


def adapted(mlp, method, **options):
    """A small model whose adapter changes its output, of one method of PEFT."""
    torch.manual_seed(3)
    if method == "lora":
        config = LoraConfig(r=4, target_modules=["lin0", "lin1"], init_lora_weights=False)
    else:
        config = RodeConfig(
            ranks=(2, 1, 3), dropout=0.0, init_weights=False, target_modules=["lin0", "lin1"], **options
        )
    model = get_peft_model(mlp(torch.float64), config)
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
        layer.base_layer.weight.requires_grad_()  # then products are kept for weight gradients, too
    return model


def without_bias(model):
    for layer in (model.base_model.model.lin0, model.base_model.model.lin1):
        layer.base_layer.bias = None
    return model


def gradients(model, x, run):
    """Output and gradients of x and every parameter; run: what is called with x."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kept", PRODUCTS, ids=lambda op: op.name())
@pytest.mark.parametrize("shape", [(7, 12), (2, 4, 12)], ids=["2d", "3d"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("method", ["rode", "rode-two-adapters", "rode-softmax", "lora"])
def test_selective_checkpointing_keeps_products_as_they_were(mlp, method, bias, shape, kept):
    options = {"gate": "softmax"} if method == "rode-softmax" else {}
    model = adapted(mlp, method, **options)
    if method == "rode-two-adapters":
        model.add_adapter("second", RodeConfig(ranks=(2,), gate="none", dropout=0.0, init_weights=False,
                                               target_modules=["lin0", "lin1"]))  # fmt: skip
        model.base_model.set_adapter(["default", "second"])
    if not bias:
        without_bias(model)
    x = torch.randn(shape, dtype=torch.float64)

    def policy(_context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == kept else CheckpointPolicy.PREFER_RECOMPUTE

    context = functools.partial(create_selective_checkpoint_contexts, policy)
    want = gradients(model, x, model)
    got = gradients(model, x, lambda x: checkpoint(model, x, use_reentrant=False, context_fn=context))
    assert_same(got, want)


class KeepOutputs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op in PRODUCTS:
            self.kept.append((out, out.clone()))
        return out


class KeepResults(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function is nn.functional.linear:
            self.kept.append((out, out.clone()))
        return out


@pytest.mark.parametrize("mode", [KeepOutputs, KeepResults])
@pytest.mark.parametrize("grad", [True, False])
def test_what_a_mode_keeps_is_not_overwritten(mlp, mode, grad):
    model, x = without_bias(adapted(mlp, "rode")), torch.randn(7, 12, dtype=torch.float64)
    with torch.set_grad_enabled(grad), mode() as watch:
        model(x)
    assert watch.kept
    for out, copy in watch.kept:
        assert torch.equal(out, copy)


class PostForward(ModelHook):
    """accelerate's hook, here one that keeps what it saw."""

    def __init__(self):
        self.kept = []

    def post_forward(self, module, output):
        self.kept.append((output, output.clone()))
        return output


def watch_by_global_hook(base, kept):
    def hook(module, args, output):
        if module is base:
            kept.append((output, output.clone()))

    return nn.modules.module.register_module_forward_hook(hook).remove


def watch_by_module_hook(base, kept):
    return base.register_forward_hook(lambda m, a, output: kept.append((output, output.clone()))).remove


def watch_by_accelerate(base, kept):
    hook = PostForward()
    hook.kept = kept
    add_hook_to_module(base, hook)
    return lambda: remove_hook_from_module(base)


def watch_by_class(base, kept):
    forward = nn.Linear.forward

    def keeping(self, x):
        output = forward(self, x)
        if self is base:
            kept.append((output, output.clone()))
        return output

    nn.Linear.forward = keeping
    return lambda: setattr(nn.Linear, "forward", forward)


@pytest.mark.parametrize(
    "watch", [watch_by_global_hook, watch_by_module_hook, watch_by_accelerate, watch_by_class]
)
@pytest.mark.parametrize("method", ["rode", "lora"])
@pytest.mark.parametrize("shape", [(7, 12), (2, 4, 12)], ids=["2d", "3d"])
def test_what_a_hook_keeps_is_the_base_layers_own_output(mlp, shape, method, watch):
    model = without_bias(adapted(mlp, method))
    base = model.base_model.model.lin0.base_layer
    x = torch.randn(shape, dtype=torch.float64)
    want = gradients(model, x, model)
    kept = []
    stop = watch(base, kept)
    try:
        got = gradients(model, x, model)
    finally:
        stop()
    assert_same(got, want)
    assert kept
    for output, copy in kept:
        assert torch.equal(output, copy)
        torch.testing.assert_close(output, nn.functional.linear(x, base.weight), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["rode", "lora"])
def test_a_patched_forward_may_return_a_tensor_that_it_keeps(mlp, method):
    model = adapted(mlp, method)
    base = model.base_model.model.lin0.base_layer
    x = torch.randn(7, 12, dtype=torch.float64)
    with torch.no_grad():
        want = model(x)
        cached = nn.functional.linear(x, base.weight, base.bias)
        before = cached.clone()
        base.forward = lambda _x: cached
        first, second = model(x), model(x)
    assert torch.equal(cached, before)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, want, rtol=1e-12, atol=1e-12)


def test_a_plain_linear_layers_output_is_written_in_place(mlp):
    """The usual case stays the fast one: the layer returns the very memory that the product went to."""
    from rode.tuner import ownership

    model = adapted(mlp, "rode")
    base = model.base_model.model.lin0.base_layer
    result = base(torch.randn(7, 12, dtype=torch.float64))
    assert ownership.may_write_into(result, base)


@pytest.mark.parametrize("shape", [(7, 12), (2, 4, 12)], ids=["2d", "3d"])
def test_product_and_mixture_of_a_plain_layer_are_one_node(mlp, shape):
    """Also where the layer has a bias and x three dimensions, where `F.linear` returns a view."""
    model = adapted(mlp, "rode")
    layer, x = model.base_model.model.lin0, torch.randn(shape, dtype=torch.float64)
    want = gradients(
        layer, x, lambda x: nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    )
    assert type(layer(x).grad_fn).__name__ == "LinearMixtureFunctionBackward"
    layer.rode_adapters["default"].B.data.zero_()
    got = gradients(layer, x, layer)
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def test_the_dtype_of_the_base_layer_decides_as_it_does_without_adapters(mlp):
    model = adapted(mlp, "rode")
    with pytest.raises(RuntimeError, match="dtype"):  # F.linear's own error
        model.base_model.model.lin0(torch.randn(7, 12))
