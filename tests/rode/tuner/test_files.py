"""Adapters and models on their way through files and processes: whole, or refused."""

from __future__ import annotations

import copy
import io
import json
import multiprocessing
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from rode.tuner import GateStatistics, RodeConfig

MLP = ["gate_proj", "up_proj", "down_proj"]
PRESETS = {
    "relu": {},
    "with bias": dict(router_bias=True),
    "top-1": dict(gate="topk", top_k=1),
    "task": dict(router_input="task", num_ids=3),
    "sequence": dict(router_input="sequence"),
    "router per block": dict(router_per="block"),
    "auxiliary loss": dict(aux_loss="l1"),
    "whole blocks": dict(
        gate="topk", top_k=2, normalize=True, router_per="block", expert_per="block", target_modules=MLP
    ),
}


def saved(mlp, folder, **fields):
    torch.manual_seed(0)
    config = RodeConfig(
        ranks=(2, 3), dropout=0.0, init_weights=False, target_modules=["lin0", "lin1"], **fields
    )
    get_peft_model(mlp(), config).save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def drop_one(tensors):
    tensors.pop("base_model.model.lin0.rode_adapters.B")


def rename_one(tensors):
    tensors["base_model.model.lin0.rode_adapters.C"] = tensors.pop("base_model.model.lin0.rode_adapters.B")


def add_one(tensors):
    tensors["base_model.model.lin2.rode_adapters.A"] = torch.zeros(5, 12)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_one, r"1 missing, such as base_model\.model\.lin0\.rode_adapters\.B"),
        (
            rename_one,
            r"1 missing, such as .*lin0\.rode_adapters\.B.*; 1 surplus, such as .*lin0\.rode_adapters\.C",
        ),
        (add_one, r"1 surplus, such as .*lin2\.rode_adapters\.A"),
        (dict.clear, r"6 missing"),
    ],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_missing_and_surplus_tensors_are_an_error(mlp, tmp_path, damage, words, low_cpu_mem_usage):
    file = saved(mlp, tmp_path)
    tensors = load_file(file)
    damage(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(mlp(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("router_bias", True, "2 missing, such as .*router_bias"),
        ("gate", "none", "2 surplus, such as .*router_weight"),
        ("target_modules", ["lin0"], "3 surplus, such as .*lin1"),
    ],
)
def test_an_edited_configuration_that_wants_other_tensors_is_an_error(mlp, tmp_path, field, value, words):
    saved(mlp, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=words):
        PeftModel.from_pretrained(mlp(), tmp_path)


def test_a_whole_adapter_loads_under_every_name(mlp, tmp_path):
    """Also where the name occurs in module names, and beside others."""
    saved(mlp, tmp_path)
    base = mlp()
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    x = torch.randn(4, 12, dtype=torch.float64)
    want = model(x)
    for name in ("second", "lin0", "rode"):
        model.load_adapter(tmp_path, name)
        model.set_adapter(name)
        assert torch.equal(model(x), want)


def test_modules_to_save_without_their_tensors_are_an_error(mlp, tmp_path):
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = mlp(), nn.Linear(5, 2, dtype=torch.float64)

        def forward(self, x):
            return self.head(self.inner(x))

    config = RodeConfig(ranks=(2,), target_modules=["lin0"], modules_to_save=["head"])
    get_peft_model(Three(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name: t for name, t in load_file(file).items() if "head" not in name}
    save_file(tensors, file)
    with pytest.raises((ValueError, KeyError), match="head"):
        PeftModel.from_pretrained(Three(), tmp_path)


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def tiny_llama():
    """No LLaVA: after a pass transformers' own hooks keep that one from being pickled."""
    config = LlamaConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=101, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("copied", [through_pickle, through_torch_save, copy.deepcopy])
@pytest.mark.parametrize("fields", PRESETS.values(), ids=PRESETS)
def test_a_model_can_be_pickled_saved_and_copied(copied, fields):
    """Before and after a pass; the copy gives the same output and loss, and has hooks of its own."""
    torch.manual_seed(1)
    model = get_peft_model(
        tiny_llama(), RodeConfig(ranks=(2, 4, 8), dropout=0.0, init_weights=False, **fields)
    )
    ids = torch.randint(3, 100, (2, 7))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) < 3, -100)}
    if fields.get("router_input") == "task":
        batch["rode_task_ids"] = torch.tensor([0, 2])
    early = copied(model)
    wants = [model(**batch), model(**batch)]
    late = copied(model)
    for other in (early, late):
        got = other(**batch)
        for want in wants:
            assert torch.equal(got.logits, want.logits)
            assert torch.equal(got.loss, want.loss)
    contexts = [next(m.context for m in x.modules() if hasattr(m, "context")) for x in (model, early, late)]
    assert len(set(map(id, contexts))) == 3


@pytest.mark.parametrize("copied", [through_pickle, copy.deepcopy])
@pytest.mark.parametrize("fields", [{}, {"router_input": "sequence"}], ids=["relu", "sequence"])
def test_statistics_hang_on_a_model_without_tying_it_down(copied, fields):
    """One pair of hooks, whoever listens; a model that is copied meanwhile is whole; afterwards it is as before."""
    model = get_peft_model(tiny_llama(), RodeConfig(ranks=(2, 4), init_weights=False, **fields)).eval()
    base = model.get_base_model()
    before = len(base._forward_pre_hooks), len(base._forward_hooks)
    ids = torch.randint(3, 100, (2, 7))
    with GateStatistics().attach(model) as statistics:
        assert len(base._forward_pre_hooks) == len(base._forward_hooks) == 1
        want = model(input_ids=ids).logits
        tokens = statistics.report().layers[0].tokens
        assert torch.equal(copied(model)(input_ids=ids).logits, want)
        assert statistics.report().layers[0].tokens == tokens  # the copy counts for itself
    assert (len(base._forward_pre_hooks), len(base._forward_hooks)) == before
    assert torch.equal(model(input_ids=ids).logits, want)


def _logits(model, x, queue):
    with torch.no_grad():
        queue.put(model(x).numpy().tolist())


def test_a_model_reaches_a_spawned_process(mlp):
    torch.manual_seed(0)
    model = get_peft_model(
        mlp(), RodeConfig(ranks=(2, 3), init_weights=False, target_modules=["lin0"])
    ).eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    want = model(x).detach()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_logits, args=(model, x, queue))
    process.start()
    got = queue.get(timeout=120)
    process.join()
    assert torch.equal(torch.tensor(got, dtype=torch.float64), want)
