"""Weights of another file in an adapter's own tensors."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from rode.tuner import RodeConfig, hotswap_adapter

FIELDS = dict(ranks=(2, 3), init_weights=False, target_modules=["lin0", "lin1"], router_bias=True)


@pytest.fixture
def saved(mlp, tmp_path):
    """A function (name, seed, fields) -> the folder of a saved adapter."""

    def save(name, seed, **changes):
        torch.manual_seed(seed)
        model = get_peft_model(mlp(), RodeConfig(**{**FIELDS, **changes}))
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def x():
    return torch.randn(4, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_other_adapter_in_the_same_tensors(mlp, saved, x, compiled):
    first, second = saved("a", 1), saved("b", 2)
    model = PeftModel.from_pretrained(mlp(), first, is_trainable=True).eval()
    want = PeftModel.from_pretrained(mlp(), second).eval()(x)
    addresses = [p.data_ptr() for p in model.parameters()]
    called = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    assert not torch.allclose(called(x), want)
    hotswap_adapter(called, second)
    if compiled:
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(called(x), want, rtol=1e-12, atol=1e-12)
    else:
        assert torch.equal(model(x), want)
    assert [p.data_ptr() for p in model.parameters()] == addresses
    assert all(p.requires_grad for n, p in model.named_parameters() if "rode_" in n)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": (2, 4)}, r"ranks=\(2, 4\), but the model's adapter has \(2, 3\)"),
        ({"alpha": 8.0}, "alpha=8.0"),
        ({"gate": "softmax"}, "gate='softmax'"),
        ({"target_modules": ["lin0"]}, "target_modules"),
    ],
)
def test_adapters_that_differ_are_refused(mlp, saved, x, changes, words):
    model = PeftModel.from_pretrained(mlp(), saved("a", 1)).eval()
    before = model(x)
    with pytest.raises(ValueError, match=words):
        hotswap_adapter(model, saved("b", 2, **changes))
    assert torch.equal(model(x), before)


def test_what_cannot_be_swapped(mlp, saved, x):
    folder = saved("a", 1, gate="none", router_bias=False)
    model = PeftModel.from_pretrained(mlp(), folder).eval()
    with pytest.raises(
        ValueError, match=r"expected a RoDE adapter of the model, got 'other'; it has \['default'\]"
    ):
        hotswap_adapter(model, folder, "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the base weights"):
        hotswap_adapter(model, folder)
    lora = get_peft_model(mlp(), LoraConfig(target_modules=["lin0"]))
    with pytest.raises(ValueError, match="expected a RoDE adapter of the model"):
        hotswap_adapter(lora, folder)
    with pytest.raises(ValueError, match="expected a PeftModel, got Mlp"):
        hotswap_adapter(mlp(), folder)
    kept = get_peft_model(
        mlp(), RodeConfig(**{**FIELDS, "target_modules": ["lin0"], "modules_to_save": ["lin1"]})
    )
    with pytest.raises(ValueError, match="whole modules are not swapped"):
        hotswap_adapter(kept, folder)
