"""Promises of adapters, kept on tiny random models of each family in the configurations that people use."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from families import FAMILIES, batch_of, family
from rode.tuner import GateStatistics, RodeConfig, RodeLayer

# Parts of names that no layer adapted by default has.
TOWERS = ("vision", "visual", "image", "projector", "connector", "merger")
CONFIGS = {
    "relu": dict(),
    "softmax with bias": dict(gate="softmax", router_bias=True),
    "top-1": dict(gate="topk", top_k=1),
    "one expert": dict(ranks=(4,), gate="none"),
    "shared A": dict(shared_A=True, ranks=(2, 2), gate="softmax"),
    "constant gates": dict(gate="softmax", router_input="constant"),
}
TEXT_ONLY = [name for name in FAMILIES if name != "whisper"]


def adapted(name, **fields):
    torch.manual_seed(1)
    return get_peft_model(
        family(name), RodeConfig(**{"ranks": (2, 3), "dropout": 0.0, "init_weights": False, **fields})
    ).eval()


def layers_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, RodeLayer)}


def logits(model, name):
    with torch.no_grad():
        return model(**batch_of(name)).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_default_targets_are_the_language_models(name):
    names = list(layers_of(adapted(name)))
    assert names
    assert not any(part in layer for layer in names for part in TOWERS)
    if name == "whisper":
        assert all(".decoder." in layer for layer in names)
        assert any("encoder_attn" in layer for layer in names)
    if name == "t5":
        assert any("EncDecAttention" in layer for layer in names)
        assert any(".encoder." in layer for layer in names)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_new_adapter_changes_nothing_and_each_parameter_learns(name):
    want = logits(family(name), name)
    model = adapted(name, init_weights=True, router_init="kaiming")
    assert torch.equal(logits(model, name), want)
    model = adapted(name).train()
    assert not torch.equal(logits(model.eval(), name), want)
    model(**batch_of(name)).loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("rode_adapters" in n for n in trained)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trained.values())
    with model.disable_adapter():
        assert torch.equal(logits(model.eval(), name), want)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_adapter_gives_the_same_bits(name, config, tmp_path):
    model = adapted(name, **config)
    want = logits(model, name)
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(family(name), tmp_path, low_cpu_mem_usage=low_memory).eval()
        assert torch.equal(logits(again, name), want)
    assert torch.equal(logits(copy.deepcopy(model), name), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_merging_is_exact_or_refused(name):
    with pytest.raises(ValueError, match="its relu gates depend on the input"):
        adapted(name).merge_and_unload()
    for config in (CONFIGS["one expert"], CONFIGS["constant gates"]):
        model = adapted(name, **config)
        want = logits(model, name)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, name), want, rtol=1e-4, atol=1e-5)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, name), want, rtol=1e-4, atol=1e-5)
        merged = model.merge_and_unload()
        assert not layers_of(merged)
        torch.testing.assert_close(logits(merged, name), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_several_adapters(name):
    model = adapted(name)
    first = logits(model, name)
    torch.manual_seed(2)
    model.add_adapter("other", RodeConfig(ranks=(3,), gate="none", init_weights=False))
    assert torch.equal(logits(model, name), first)
    model.set_adapter("other")
    second = logits(model.eval(), name)
    assert not torch.equal(second, first)
    model.delete_adapter("default")
    assert torch.equal(logits(model, name), second)
    status = model.get_model_status()
    assert status.available_adapters == ["other"]
    assert status.enabled
    with pytest.raises(ValueError, match="split the batch"):
        model(**batch_of(name), adapter_names=["other", "__base__"])


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_stay_float32_on_a_16_bit_base(name, dtype):
    torch.manual_seed(1)
    base = family(name).to(dtype).eval()
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(name).items()}
    logits_dtype = base(**batch).logits.dtype  # Gemma 3 gives float32 in some versions of transformers
    assert logits_dtype in (dtype, torch.float32)
    model = get_peft_model(base, RodeConfig(ranks=(2, 3), init_weights=False, dropout=0.0)).eval()
    assert {p.dtype for n, p in model.named_parameters() if "rode_" in n} == {torch.float32}
    found = model(**batch).logits
    assert found.dtype == logits_dtype
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_gives_the_same_gradients(name):
    grads = []
    for checkpointing in (False, True):
        model = adapted(name).train()
        if checkpointing:
            if not family(name).supports_gradient_checkpointing:
                pytest.skip("the family has no gradient checkpointing")
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        model(**batch_of(name)).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for n, grad in grads[0].items():
        torch.testing.assert_close(grads[1][n], grad, rtol=1e-4, atol=1e-6, msg=n)


@pytest.mark.parametrize("name", TEXT_ONLY)
def test_injection_without_peft_around_it(name):
    want = logits(adapted(name), name)
    torch.manual_seed(1)
    config = RodeConfig(ranks=(2, 3), dropout=0.0, init_weights=False)
    model = inject_adapter_in_model(config, family(name)).eval()
    assert torch.equal(logits(model, name), want)


@pytest.mark.parametrize("name", FAMILIES)
def test_modules_to_save(name, tmp_path):
    base = family(name)
    head = next((n for n in ("lm_head", "proj_out", "cls.predictions.decoder") if _has(base, n)), None)
    model = adapted(name, modules_to_save=[head])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "modules_to_save" in n:
                p.add_(0.1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family(name), tmp_path).eval()
    assert torch.equal(logits(again, name), logits(model, name))


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_targets_are_loras(name):
    """The same layers as PEFT's own table gives LoRA."""
    rode = {n.removeprefix("base_model.model.") for n in layers_of(adapted(name))}
    lora = get_peft_model(family(name), LoraConfig())
    assert rode == set(lora.targeted_module_names)


def test_mllamas_cross_attention_adds_what_loras_does():
    """With pictures, and the same factors in both: the same logits and gradients."""
    config = dict(target_modules=r".*language_model.*(q_proj|v_proj)")
    lora = get_peft_model(family("mllama"), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **config))
    rode = adapted("mllama", ranks=(4,), gate="none", alpha=8, scaling="alpha/r", **config)
    pairs = {}
    for layer, module in layers_of(rode).items():
        other, adapter = lora.get_submodule(layer), module.rode_adapters["default"]
        for mine, its in ((adapter.A, other.lora_A), (adapter.B, other.lora_B)):
            its["default"].weight.data.copy_(mine.data)
            pairs[mine] = its["default"].weight
    assert sum("cross_attn" in layer for layer in layers_of(rode)) == 2
    outputs = [model(**batch_of("mllama")) for model in (rode, lora)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-5, atol=1e-6)
    for output in outputs:
        output.loss.backward()
    for mine, its in pairs.items():
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-7)


PICTURES = dict(target_modules=r".*cross_attn\.v_proj", task_type="CAUSAL_LM")


def test_masks_of_text_do_not_touch_what_reads_pictures():
    """Keys and values of a cross-attention see patches, here as many as there are tokens."""
    model = adapted("mllama", gate="softmax", aux_loss="load-balance", **PICTURES).train()
    batch = batch_of("mllama")
    losses = [model(**batch).aux_loss]
    batch["attention_mask"][0, 4:] = 0
    losses.append(model(**batch).aux_loss)
    assert torch.equal(losses[0], losses[1])
    with GateStatistics().attach(model) as statistics:
        model(**batch)
    assert [layer.tokens for layer in statistics.report().layers] == [{"image": 20, "text": 0, "all": 20}]
    with GateStatistics(by_example=True).attach(model) as statistics:
        model(**batch)
    assert [example.tokens.tolist() for example in statistics.examples()] == [[[10, 0], [10, 0]]]


def test_a_sequences_router_reads_pictures_too():
    model = adapted("mllama", gate="softmax", router_input="sequence").train()
    batch = batch_of("mllama")
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :4] = -100
    model(**batch).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if "router_weight" in n}
    assert len(grads) == 4
    assert all(grad.abs().max() > 0 for grad in grads.values())


@pytest.mark.parametrize("training", [False, True])
def test_tasks_reach_the_pictures_of_their_row(training):
    """Row 0 has another task, and nothing changes in row 1."""
    model = adapted("mllama", gate="softmax", router_input="task", num_ids=2, **PICTURES).train(training)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if n.endswith("table"):
                p.copy_(torch.tensor([[2.0, -2.0], [-2.0, 2.0]]))
    batch = batch_of("mllama")
    one = model(**batch, rode_task_ids=torch.tensor([0, 1])).logits
    other = model(**batch, rode_task_ids=torch.tensor([1, 1])).logits
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_mllama_generates_with_pictures():
    batch = batch_of("mllama")
    del batch["labels"]
    for fields in ({}, dict(gate="softmax", router_input="sequence")):
        model = adapted("mllama", task_type="CAUSAL_LM", **fields)
        short = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        whole = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=False)
        assert torch.equal(short, whole)
