"""The short way of single tokens while a model generates: the same tokens and bits, and the ordinary way once anything changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rode.tuner import GateStatistics
from rode.tuner.decoding import Decoding, decoding
from rode_kernels import backends
from tiny_llama import adapted_llama

pytestmark = pytest.mark.skipif(not backends()["cpu"].available, reason="no native code")

IDS = torch.arange(10).view(2, 5)
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def adapted(dtype=torch.float32, **options):
    return adapted_llama(dtype, ["q_proj", "v_proj", "down_proj"], **options).eval()


def layers_of(model):
    return [m for m in model.modules() if hasattr(m, "rode_adapters")]


@pytest.fixture
def counted(monkeypatch):
    """Calls that took the short way."""
    taken = []
    run = Decoding.run

    def counting(self, x):
        y = run(self, x)
        taken.append(y is not None)
        return y

    monkeypatch.setattr(Decoding, "run", counting)
    return taken


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [dict(), dict(router_bias=True), dict(gate="softmax"), dict(ranks=(3, 3), shared_A=True)],
    ids=str,
)
def test_tokens_and_logits_are_those_of_the_ordinary_way(monkeypatch, counted, dtype, options):
    model = adapted(dtype, **options)
    more = {"return_dict_in_generate": True, "output_logits": True}
    short = model.generate(input_ids=IDS, **GREEDY, **more)
    assert any(counted) == (options in (dict(), dict(router_bias=True)))
    monkeypatch.setattr(Decoding, "run", lambda self, x: None)
    long = model.generate(input_ids=IDS, **GREEDY, **more)
    assert torch.equal(short.sequences, long.sequences)
    assert torch.equal(torch.stack(short.logits), torch.stack(long.logits))
    assert all(layer.decoding is None for layer in layers_of(model))


def hook_on_the_base_layer(model, layer):
    return layer.base_layer.register_forward_hook(lambda m, a, y: y + 1).remove


def hook_on_the_adapter(model, layer):
    return layer.adapter("default").register_forward_hook(lambda m, a, y: y * 2).remove


def global_hook(model, layer):
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, a, y: y + 1 if m is layer.base_layer else None
    )
    return hook.remove


def patched_forward(model, layer):
    forward = layer.base_layer.forward
    layer.base_layer.forward = lambda x: forward(x) + 1
    return lambda: layer.base_layer.__dict__.pop("forward")


def another_parameter(model, layer):
    old = layer.adapter("default").A
    layer.adapter("default").A = nn.Parameter(old * 2)
    return lambda: setattr(layer.adapter("default"), "A", old)


def parameter_in_place(model, layer):
    with torch.no_grad():
        layer.adapter("default").B.mul_(2)

    def back():
        with torch.no_grad():
            layer.adapter("default").B.div_(2)

    return back


def another_weight(model, layer):
    old = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(old * 2)
    return lambda: setattr(layer.base_layer, "weight", old)


def weight_in_place(model, layer):
    layer.base_layer.weight.data.mul_(2)
    return lambda: layer.base_layer.weight.data.div_(2)


def adapters_off(model, layer):
    layer.enable_adapters(False)
    return lambda: layer.enable_adapters(True)


def training(model, layer):
    model.train()
    return model.eval


def gradients_on(model, layer):
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(True)
    return lambda: torch.set_grad_enabled(before)


def statistics(model, layer):
    return GateStatistics(model).detach


def another_adapter(model, layer):
    """Under the same name."""
    old = layer.rode_adapters["default"]
    layer.rode_adapters["default"] = new = copy.deepcopy(old)
    with torch.no_grad():
        new.A.mul_(2)
    return lambda: layer.rode_adapters.__setitem__("default", old)


def auxiliary_loss(model, layer):
    """The gates of each call are read from here on."""
    config = layer.adapter("default").config
    config.aux_loss = "l1"
    return lambda: setattr(config, "aux_loss", "none")


CHANGES = [
    another_adapter,
    auxiliary_loss,
    hook_on_the_base_layer,
    hook_on_the_adapter,
    global_hook,
    patched_forward,
    another_parameter,
    parameter_in_place,
    another_weight,
    weight_in_place,
    adapters_off,
    training,
    gradients_on,
    statistics,
]


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_in_between_counts(change):
    """As a logits processor may change it between two tokens."""
    model = adapted(dropout=0.4)
    layer, x = layers_of(model)[0], torch.randn(1, 1, 24)
    with torch.no_grad(), decoding([layer]):
        before = layer(x)
        assert torch.equal(layer(x), before)
        assert layer.decoding.run(x) is not None
        undo = change(model, layer)
        torch.manual_seed(1)
        changed = layer(x)
        layer.decoding, kept = None, layer.decoding
        torch.manual_seed(1)
        assert torch.equal(layer(x), changed)
        layer.decoding = kept
        undo()
        assert torch.equal(layer(x), before)


class Seeing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_autocast_and_other_inputs_take_the_ordinary_way():
    model = adapted(dropout=0.0)
    layer, x = layers_of(model)[0], torch.randn(1, 1, 24)
    with torch.no_grad(), decoding([layer]):
        before = layer(x)
        with Seeing() as mode:
            assert layer.decoding.run(x) is None
            assert torch.equal(layer(x), before)
        assert any("rode.mixture" in name for name in mode.seen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x.expand(2, 1, 24)).shape == (2, 1, 24)
        with pytest.raises(RuntimeError, match="dtype"):
            layer(x.double())
        with torch.inference_mode():
            assert torch.equal(layer(x.clone()), before)
        assert layer.decoding.run(x) is not None


def test_a_copy_made_while_generating_has_none():
    model = adapted()
    layer = layers_of(model)[0]
    with torch.no_grad(), decoding([layer]):
        layer(torch.randn(1, 1, 24))
        other, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for copied in (other, again):
        assert layers_of(copied)[0].decoding is None


def test_an_error_leaves_nothing():
    model = adapted()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(input_ids=IDS, max_new_tokens=-1)
    assert all(layer.decoding is None for layer in layers_of(model))
