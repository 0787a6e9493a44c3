"""Bases that were quantised without transformers; plain LoRA beside them.

optimum-quanto comes with `rode[dev]`. The others slow down every import of PEFT: `pip install hqq torchao==0.18.*`.
"""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from families import batch_of, family
from rode.tuner import RodeConfig

TARGETS = ["lin0", "lin1"]
RODE = dict(target_modules=TARGETS, init_weights=False, dropout=0.0)
CONFIGS = {
    "lora": LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False),
    "rode": RodeConfig(ranks=(2, 4), **RODE),
}
HQQ = ["hqq 4 bit", "hqq 8 bit"]
# At the first use of 4 bits quanto compiles C++, which takes a minute.
QUANTO = ["quanto qint8", pytest.param("quanto qint4", marks=pytest.mark.slow), "quanto qfloat8"]
WITH_ACTIVATIONS = "quanto qint8 activations"
KINDS = [*HQQ, *QUANTO, WITH_ACTIVATIONS]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


def quantized(kind: str, dtype: torch.dtype = torch.float32) -> Net:
    """The same small model every time, its layers quantised by HQQ or quanto."""
    library, how, *activations = kind.split(maxsplit=2)
    torch.manual_seed(0)
    net = Net().to(dtype).requires_grad_(False)
    if library == "hqq":
        hqq = pytest.importorskip("hqq.core.quantize")
        for name in TARGETS:
            config = hqq.BaseQuantizeConfig(nbits=int(how[0]), group_size=32)
            layer = hqq.HQQLinear(net.get_submodule(name), config, compute_dtype=dtype, device="cpu")
            setattr(net, name, layer)
        return net
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(net, weights=getattr(quanto, how), activations=quanto.qint8 if activations else None)
    if activations:
        with torch.no_grad(), quanto.Calibration():
            net(torch.randn(3, 5, 64, dtype=dtype))
    quanto.freeze(net)
    return net


@torch.no_grad()
def plain(net: Net) -> Net:
    """The same model with plain linear layers around the dequantised weights."""
    twin = Net().requires_grad_(False)
    for name in TARGETS:
        layer = net.get_submodule(name)
        weight = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight.dequantize()
        twin.get_submodule(name).weight.copy_(weight)
        twin.get_submodule(name).bias.copy_(layer.bias)
    return twin


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_torchaos_quantize_applied_directly(kind, config):
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    net = Net()
    quantization.quantize_(net, getattr(quantization, kind)())
    x = torch.randn(3, 5, 64)
    want = net(x)
    model = get_peft_model(net, config)
    y = model(x)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    assert not torch.allclose(y, want)
    with model.disable_adapter():
        assert torch.equal(model(x), want)


def test_merging_into_it_is_refused():
    quantization = pytest.importorskip("torchao.quantization")
    net = Net()
    quantization.quantize_(net, quantization.Int8WeightOnlyConfig())
    model = get_peft_model(net, RodeConfig(ranks=(4,), gate="none", **RODE))
    with pytest.raises(ValueError, match="lin0: torchao's quantize_ was applied to the model itself"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_torchs_dynamic_quantisation_is_refused():
    net = torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})
    with pytest.raises(
        TypeError, match="lin0: Linear is torch's dynamic quantisation, which passes no gradient"
    ):
        get_peft_model(net, RodeConfig(ranks=(2, 4), **RODE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_hqq_and_quanto(kind, config, dtype):
    net = quantized(kind, dtype)
    x = torch.randn(3, 5, 64, dtype=dtype)
    want = net(x)
    model = get_peft_model(net, config)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    optimizer = torch.optim.SGD(trained(model).values(), lr=1e-3)
    losses = []
    for _ in range(2):
        loss = model(x).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained(model).values())
    assert losses[1] < losses[0]
    with model.disable_adapter():
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("kind", HQQ + QUANTO)
def test_values_and_gradients_are_those_around_the_dequantised_weight(kind):
    net = quantized(kind)
    x = torch.randn(3, 5, 64)
    runs = []
    for base in (plain(net), net):
        torch.manual_seed(1)
        model = get_peft_model(base, CONFIGS["rode"])
        leaf = x.clone().requires_grad_()
        y = model(leaf)
        y.square().sum().backward()
        runs.append({"y": y, "x": leaf.grad, **{n: p.grad for n, p in trained(model).items()}})
    assert len(runs[0]) == 2 + 2 * 3
    for name, want in runs[0].items():
        torch.testing.assert_close(runs[1][name], want, rtol=1e-4, atol=1e-5 * want.abs().max().item())


def test_values_with_quantised_activations():
    """The adapter reads the activations, and adds to the output, as they were before the base layer rounded them."""
    net = quantized(WITH_ACTIVATIONS)
    x = torch.randn(3, 5, 64)
    model = get_peft_model(net, RodeConfig(ranks=(4,), gate="none", scaling="alpha/r", **RODE))
    h = x
    for name in TARGETS:
        layer = net.get_submodule(name)
        adapter = layer.rode_adapters["default"]
        h = layer.base_layer(h) + adapter.scaling[0] * (h @ adapter.A.T @ adapter.B.T)
        h = torch.relu(h) if name == "lin0" else h
    torch.testing.assert_close(model(x), h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_saved_and_loaded_gives_the_same_bits(kind, tmp_path):
    x = torch.randn(3, 5, 64)
    model = get_peft_model(quantized(kind), CONFIGS["rode"])
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(quantized(kind), tmp_path, low_cpu_mem_usage=low_memory)
        assert torch.equal(again(x), model(x))
    assert isinstance(model.unload(), Net)
    assert torch.equal(model.get_base_model()(x), quantized(kind)(x))


@pytest.mark.parametrize("kind", HQQ)
def test_merging_into_hqq_quantises_the_sum(kind):
    net = quantized(kind)
    from hqq.core.quantize import HQQLinear

    x = torch.randn(3, 5, 64)
    model = get_peft_model(net, RodeConfig(ranks=(4,), gate="none", **RODE))
    with torch.no_grad():
        want = model(x)
    expected = {}
    for name in TARGETS:
        layer = net.get_submodule(name)
        weight = layer.base_layer.dequantize() + layer.get_delta_weight("default")
        config = {**layer.base_layer.quant_config, "offload_meta": False}
        anew = HQQLinear.from_weights(weight, None, config, compute_dtype=torch.float32, device="cpu")
        expected[name] = anew.dequantize()
    biases = {name: net.get_submodule(name).base_layer.bias for name in TARGETS}
    merged = model.merge_and_unload()
    for name in TARGETS:
        layer = merged.get_submodule(name)
        assert isinstance(layer, HQQLinear)
        assert torch.equal(layer.dequantize(), expected[name])
        assert torch.equal(layer.bias, biases[name])
    error = (merged(x) - want).abs().max() / want.abs().max()
    assert error < (0.02 if "8" in kind else 0.3)


@pytest.mark.parametrize("kind", [*QUANTO, WITH_ACTIVATIONS])
def test_merging_into_quanto_is_refused(kind):
    """It keeps what it had when a weight is assigned: a merged adapter would be lost without a word."""
    model = get_peft_model(quantized(kind), RodeConfig(ranks=(4,), gate="none", **RODE))
    x = torch.randn(3, 5, 64)
    want = model(x)
    with pytest.raises(
        ValueError, match="lin0: PEFT stores no merged weight in a layer quantised by optimum-q"
    ):
        model.merge_and_unload()
    assert torch.equal(model(x), want)


def test_a_llama_that_transformers_quantised_by_quanto(tmp_path):
    pytest.importorskip("optimum.quanto")
    from transformers import LlamaForCausalLM, QuantoConfig

    family("llama").save_pretrained(tmp_path / "base")

    def load():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=QuantoConfig(weights="int8"), device_map="cpu"
        )

    model = get_peft_model(load(), RodeConfig(ranks=(2, 4), init_weights=False, dropout=0.0))
    batch = batch_of("llama")
    model(**batch).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained(model).values())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)


class Float8(nn.Linear):
    """Holds its weight in 8 bits with a scale beside it, as transformers' FP8Linear does."""

    def __init__(self):
        super().__init__(64, 64)
        self.scale = self.weight.detach().abs().max() / 448
        weight = (self.weight.detach() / self.scale).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def _parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))


class Packed(nn.Module):
    """Holds no weight at all, and its numbers under a name that nobody knows."""

    in_features, out_features = 64, 64

    def __init__(self):
        super().__init__()
        self.packed = nn.Parameter(torch.randint(256, (64, 64), dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x @ (self.packed.to(x.dtype) / 256)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (
            Float8,
            "lin0: the weight of Float8 is stored as torch.float8_e4m3fn, with scales that PEFT does not",
        ),
        (_parametrised, "lin0: ParametrizedLinear holds no weight that could be replaced"),
        (Packed, "lin0: Packed holds no weight that could be replaced"),
    ],
    ids=["float8", "parametrised", "packed"],
)
def test_merging_is_refused_where_a_weight_cannot_be_stored(make, reason):
    """Assigning would store numbers without their scale, or change nothing."""
    net = Net().requires_grad_(False)
    net.lin0 = make().requires_grad_(False)
    net.lin1.weight.requires_grad_(False)
    model = get_peft_model(net, RodeConfig(ranks=(4,), gate="none", **RODE), autocast_adapter_dtype=False)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    x = torch.randn(3, 5, 64)
    want, lin1 = model(x), net.lin1.base_layer.weight.clone()
    with pytest.raises(ValueError, match=reason):
        model.merge_adapter()
    assert torch.equal(model(x), want)
    assert torch.equal(net.lin1.base_layer.weight, lin1)


def test_an_adapter_is_where_a_layer_without_a_weight_is():
    net = Net().requires_grad_(False)
    net.lin0 = Packed().to("meta")
    model = get_peft_model(net, CONFIGS["rode"])
    model.add_adapter("other", CONFIGS["rode"])
    assert {p.device.type for p in net.lin0.rode_adapters.parameters()} == {"meta"}
