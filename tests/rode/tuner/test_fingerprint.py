"""What an adapter says of the model and the configuration that it was saved with, and what loading it elsewhere says."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from rode import RodeConfig
from rode.tuner.fingerprint import AdapterMismatch, tensors_checksum, weights_of_base
from rode.tuner.hotswap import hotswap_adapter
from tiny_llama import adapted_llama

IDS = torch.arange(8)[None]


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and the base model that it belongs to."""
    model = adapted_llama(torch.float32, ["q_proj", "v_proj"])
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", copy.deepcopy(model).unload()


def loads_silently(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterMismatch)
        return PeftModel.from_pretrained(copy.deepcopy(base), folder)


def test_the_same_model_says_nothing_and_answers_alike(saved):
    folder, base = saved
    model = loads_silently(base, folder)
    assert model.peft_config["default"].belongs_to is None  # compared once
    again = folder.parent / "again"
    model.save_pretrained(again)
    first, second = (
        json.loads((d / "adapter_config.json").read_text())["belongs_to"] for d in (folder, again)
    )
    assert (
        first["tensors"]
        == second["tensors"]
        == tensors_checksum(load_file(folder / "adapter_model.safetensors"))
    )
    assert first["base"] == second["base"]
    other = loads_silently(base, again)
    assert torch.equal(model(IDS).logits, other(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_another_precision_is_the_same_model(saved, dtype):
    folder, base = saved
    loads_silently(base.to(dtype), folder)


def test_another_base_of_the_same_sizes_is_named(saved):
    folder, base = saved
    with torch.no_grad():
        for p in base.parameters():  # as after some more training of its own
            p.add_(torch.randn_like(p) * 0.05 * p.std())
    with pytest.warns(
        AdapterMismatch, match="'default' was trained on another model: the frozen weight of .*proj"
    ):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize(
    "edit",
    [
        {"gate": "softmax"},
        {"alpha": 64.0},
        {"ranks": [4, 2, 8, 16]},
        {"dropout": 0.3},
        {"router_init": "normal"},
    ],
    ids=str,
)
def test_an_edited_configuration_is_named(saved, edit):
    folder, base = saved
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    ((key, value),) = edit.items()
    if key == "ranks":
        value = values["ranks"][::-1]
    assert values[key] != value
    file.write_text(json.dumps(values | {key: value}))
    with pytest.warns(AdapterMismatch, match="adapter_config.json: the configuration was edited"):
        PeftModel.from_pretrained(base, folder)


def test_what_does_not_change_the_mathematics_may_be_edited(saved):
    folder, base = saved
    file = folder / "adapter_config.json"
    moved = {"base_model_name_or_path": "/elsewhere", "peft_version": "9.9", "inference_mode": False}
    file.write_text(json.dumps(json.loads(file.read_text()) | moved))
    loads_silently(base, folder)


def test_one_flipped_bit_is_noticed(saved):
    folder, base = saved
    file = folder / "adapter_model.safetensors"
    state = load_file(file)
    name = next(n for n in state if n.endswith(".A"))
    state[name].view(torch.int32).view(-1)[3] ^= 1
    save_file(state, file, metadata={"format": "pt"})
    with pytest.warns(
        AdapterMismatch, match="its tensors are not those that were saved with its configuration"
    ):
        PeftModel.from_pretrained(base, folder)


def test_an_old_adapter_loads_as_before(saved):
    folder, base = saved
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    del values["belongs_to"]
    file.write_text(json.dumps(values))
    loads_silently(base, folder)


def test_tensors_of_another_time_are_no_mismatch(saved):
    """A trainer loads a checkpoint's tensors into the adapter that it has; so does a swap."""
    folder, base = saved
    model = loads_silently(base, folder)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "rode_" in name:
                p.add_(1.0)
    later = folder.parent / "later"
    model.save_pretrained(later)
    with warnings.catch_warnings():
        warnings.simplefilter("error", AdapterMismatch)
        model.load_adapter(folder, "default")
        hotswap_adapter(model, str(later), "default")
        model.load_adapter(later, "second")


def test_a_copied_configuration_serves_another_model(saved):
    """The base that is noted is that of the model, not of the configuration's first use."""
    folder, base = saved
    config = RodeConfig(ranks=(2, 2), target_modules=["q_proj"], init_weights=False)
    first = get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(2)
    second = get_peft_model(other, copy.deepcopy(first.peft_config["default"]))
    for name, model in (("first", first), ("second", second)):
        model.save_pretrained(folder.parent / name)
        loads_silently(model.unload(), folder.parent / name)


def test_weights_that_cannot_be_read_are_passed_over(saved):
    folder, base = saved
    with torch.device("meta"):
        assert weights_of_base(torch.nn.Linear(2, 2), "default") is None
    model = loads_silently(base, folder)
    for module in model.modules():
        if hasattr(module, "rode_adapters"):
            module.base_layer.to("meta")
    assert weights_of_base(model, "default") is None


def test_weights_of_eight_bits_are_passed_over(saved):
    folder, base = saved
    model = loads_silently(base, folder)
    for module in model.modules():
        if hasattr(module, "rode_adapters"):
            weight = module.base_layer.weight
            weight.data = weight.data.to(torch.float8_e4m3fn)
    assert weights_of_base(model, "default") is None
