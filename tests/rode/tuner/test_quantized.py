"""Bases that were quantised without transformers; plain LoRA beside them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rode.tuner import RodeConfig

TARGETS = ["lin0", "lin1"]
RODE = dict(target_modules=TARGETS, init_weights=False, dropout=0.0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.lin1(torch.relu(self.lin0(x)))


@pytest.mark.parametrize("kind", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize(
    "config",
    [LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False), RodeConfig(ranks=(2, 4), **RODE)],
    ids=["lora", "rode"],
)
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
