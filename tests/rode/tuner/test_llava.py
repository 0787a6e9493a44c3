"""A LLaVA built from its configuration: what is adapted, training, generation, transformers' own adapter loading."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model

from rode.tuner import RodeConfig

LANGUAGE = [
    f"model.language_model.layers.{block}.self_attn.{name}"
    for block in (0, 1)
    for name in ("q_proj", "v_proj")
]


def names(model):
    return sorted(model.base_model.targeted_module_names)


@pytest.mark.parametrize(
    "target_modules", [None, ["q_proj", "v_proj"], ["self_attn.q_proj", "v_proj"]], ids=str
)
def test_bare_names_leave_the_tower_alone(tiny_llava, target_modules, recwarn):
    model = get_peft_model(tiny_llava(), RodeConfig(target_modules=target_modules))
    assert names(model) == LANGUAGE
    assert not [w for w in recwarn if "vision tower" in str(w.message)]


def test_all_linear_is_the_language_models(tiny_llava):
    model = get_peft_model(tiny_llava(), RodeConfig(target_modules="all-linear"))
    assert len(names(model)) == 2 * 7
    assert all(name.startswith("model.language_model.") for name in names(model))
    assert not any(
        "vision" in name or "projector" in name for name in model.peft_config["default"].target_modules
    )


def test_a_regex_must_name_the_tower(tiny_llava):
    with pytest.warns(UserWarning, match="matches 4 modules of the vision tower or projector"):
        model = get_peft_model(tiny_llava(), RodeConfig(target_modules=r".*\.(q_proj|v_proj)"))
    assert names(model) == LANGUAGE
    both = r".*(vision_tower|language_model).*\.(q_proj|v_proj)"
    model = get_peft_model(tiny_llava(), RodeConfig(target_modules=both))
    assert len(names(model)) == 8
    model = get_peft_model(tiny_llava(), RodeConfig(target_modules=["multi_modal_projector.linear_1"]))
    assert names(model) == ["model.multi_modal_projector.linear_1"]
    without = r"(?!.*vision_tower).*\.(q_proj|v_proj)"
    model = get_peft_model(tiny_llava(), RodeConfig(target_modules=without))
    assert names(model) == LANGUAGE


def test_matches_in_the_tower_alone_are_an_error_that_says_so(tiny_llava):
    with pytest.raises(ValueError, match=r"2 matches lie in the vision tower.*Near misses: o_proj"):
        get_peft_model(tiny_llava(), RodeConfig(target_modules=["out_proj"]))
    with pytest.raises(ValueError, match=r"Near misses: q_proj \(as in model\.language_model\."):
        get_peft_model(tiny_llava(), RodeConfig(target_modules=["q_prj"]))


def test_layers_to_transform(tiny_llava):
    model = get_peft_model(tiny_llava(), RodeConfig(layers_to_transform=[1]))
    assert names(model) == LANGUAGE[2:]


def test_rank_pattern_by_block(tiny_llava):
    config = RodeConfig(rank_pattern={r"layers\.1\..*": (4, 4)})
    model = get_peft_model(tiny_llava(), config).get_base_model()
    ranks = [model.get_submodule(name).adapter("default").ranks for name in LANGUAGE]
    assert ranks == [(2, 4, 8, 16)] * 2 + [(4, 4)] * 2


def test_plain_decoder_default():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=11
    )
    model = get_peft_model(LlamaForCausalLM(config), RodeConfig())
    assert names(model) == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]


def train(model, batch, steps=30):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    ids = batch["input_ids"]
    labels = ids.masked_fill((ids == 100) | (batch["attention_mask"] == 0), -100)
    losses = []
    for _ in range(steps):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("gate", ["relu", "softmax", "topk", "none"])
def test_trains_and_touches_nothing_else(tiny_llava, llava_batch, gate):
    k = {"top_k": 1} if gate == "topk" else {}
    model = get_peft_model(tiny_llava(), RodeConfig(ranks=(2, 4), gate=gate, dropout=0.0, **k))
    losses = train(model, llava_batch)
    assert losses[-1] < 0.6 * losses[0]
    original = tiny_llava().state_dict()
    after = {
        name.replace("base_layer.", ""): p
        for name, p in model.get_base_model().state_dict().items()
        if "rode_" not in name
    }
    assert after.keys() == original.keys()
    assert all(torch.equal(after[name], original[name]) for name in original)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_bit(tiny_llava, llava_batch, reentrant):
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_llava(), RodeConfig(ranks=(2, 4), dropout=0.2)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        losses.append(train(model, llava_batch, steps=3))
    assert losses[0] == losses[1]


def test_bfloat16_base_with_float32_adapter_trains(tiny_llava, llava_batch):
    model = get_peft_model(tiny_llava().to(torch.bfloat16), RodeConfig(ranks=(2, 4), dropout=0.0))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = {**llava_batch, "pixel_values": llava_batch["pixel_values"].to(torch.bfloat16)}
    losses = train(model, batch)
    assert losses[-1] < 0.6 * losses[0]


def test_transformers_loads_the_adapter(tiny_llava, llava_batch, tmp_path):
    model = get_peft_model(tiny_llava(), RodeConfig(ranks=(2, 4), init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    want = model(**llava_batch).logits
    bare = tiny_llava()
    info = bare.load_adapter(tmp_path)
    assert info is None or not info.missing_keys  # before transformers 5.7 it returns None
    assert torch.equal(bare.eval()(**llava_batch).logits, want)


@pytest.mark.skipif(
    Version(transformers.__version__) >= Version("5.24") and Version(peft.__version__) < Version("0.22"),
    reason="transformers 5.24 switches adapters only with peft 0.22, which is not out",
)
def test_transformers_switches_adapters(tiny_llava, llava_batch, tmp_path):
    model = get_peft_model(tiny_llava(), RodeConfig(ranks=(2, 4), init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    want = model(**llava_batch).logits
    bare = tiny_llava()
    bare.load_adapter(tmp_path)
    bare.eval().disable_adapters()
    assert torch.equal(bare(**llava_batch).logits, tiny_llava().eval()(**llava_batch).logits)
    bare.enable_adapters()
    bare.add_adapter(RodeConfig(ranks=(1,), gate="none"), "second")
    assert bare.active_adapters() == ["second"]
    bare.delete_adapter("second")
    bare.set_adapter("default")
    assert torch.equal(bare(**llava_batch).logits, want)


def test_transformers_keeps_the_bits_on_a_16_bit_base(tiny_llava, tmp_path):
    model = get_peft_model(tiny_llava(), RodeConfig(ranks=(2, 4), init_weights=False))
    model.save_pretrained(tmp_path)
    want = {name: p for name, p in model.get_base_model().named_parameters() if "rode_" in name}
    bare = tiny_llava().to(torch.bfloat16)
    bare.load_adapter(tmp_path)
    got = {name: p for name, p in bare.named_parameters() if "rode_" in name}
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_generation_after_reload(tiny_llava, llava_batch, tmp_path):
    model = get_peft_model(tiny_llava(), RodeConfig(ranks=(2, 4), task_type="CAUSAL_LM")).eval()
    train(model, llava_batch, steps=5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    want = model.generate(**llava_batch, **options)
    assert torch.equal(again.generate(**llava_batch, **options), want)
    assert torch.equal(again.generate(**llava_batch, **options, use_cache=False), want)


def test_trainer_with_gradient_checkpointing(tiny_llava, llava_batch, tmp_path):
    from transformers import Trainer, TrainingArguments

    rows = [
        {
            "input_ids": llava_batch["input_ids"][i],
            "attention_mask": llava_batch["attention_mask"][i],
            "pixel_values": llava_batch["pixel_values"][i],
            "labels": llava_batch["input_ids"][i],
        }
        for i in (0, 1)
    ] * 4
    model = get_peft_model(tiny_llava(), RodeConfig(ranks=(2, 4)))
    arguments = TrainingArguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0]
    saved = {path.name for path in (tmp_path / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= saved
    assert not {name for name in saved if name.startswith(("model", "pytorch_model"))}
    again = PeftModel.from_pretrained(tiny_llava(), tmp_path / "checkpoint-4").eval()
    assert torch.equal(again(**llava_batch).logits, model.eval()(**llava_batch).logits)
