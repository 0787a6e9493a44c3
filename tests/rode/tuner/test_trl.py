"""TRL's trainers train the adapter as they train LoRA."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from rode.tuner import RodeConfig
from tiny_llava import tiny_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.filterwarnings("ignore")
LORA = dict(r=4, init_lora_weights=False)
RODE = dict(ranks=(2, 4), init_weights=False, dropout=0.0)
CONFIGS = {
    "lora": lambda **more: LoraConfig(task_type="CAUSAL_LM", **LORA, **more),
    "rode": lambda **more: RodeConfig(task_type="CAUSAL_LM", **RODE, **more),
}
PROMPTS = ["what is in rice", "what is in soup", "what is in pie", "what is in tea"]
ANSWERS = ["rice", "water and salt", "apples", "leaves"]
# TRL's default is bfloat16.
COMMON = dict(
    max_steps=4,
    per_device_train_batch_size=4,
    learning_rate=1e-2,
    max_length=48,
    bf16=False,
    report_to=[],
    save_strategy="no",
    logging_steps=1,
    disable_tqdm=True,
    use_cpu=True,
)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def sft(model, folder, **more):
    rows = {"prompt": PROMPTS, "completion": ANSWERS}
    checkpointing = more.pop("gradient_checkpointing", False)
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(output_dir=str(folder), gradient_checkpointing=checkpointing, **COMMON),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        **more,
    )


def dpo(model, folder, **more):
    rows = {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": ["stones"] * 4}
    return trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(folder), beta=0.5, **COMMON),
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=tiny_tokenizer(),
        **more,
    )


def started(trainer, config, start, folder):
    """A trainer that is given the configuration, or the model that has been adapted."""
    torch.manual_seed(1)
    if start == "config":
        return trainer(llama(), folder, peft_config=config)
    return trainer(get_peft_model(llama(), config), folder)


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(4, 24)[None]).logits


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("start", ["config", "model"])
def test_sft(make, start, tmp_path):
    trainer = started(sft, make(), start, tmp_path)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    before = adapter_of(trainer.model)
    trainer.train()
    found = losses(trainer)
    assert len(found) == 4
    assert found[-1] < found[0]
    after = adapter_of(trainer.model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    own = dict(trainer.model.named_parameters())
    assert all(torch.equal(own[n], p) for n, p in base.items())
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trainer.model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_takes_the_step_of_plain_pytorch(checkpointing, tmp_path):
    """The first loss and the gradients are those of the model's own loss on the same batch."""
    torch.manual_seed(1)
    trainer = sft(llama(), tmp_path, peft_config=CONFIGS["rode"](), gradient_checkpointing=checkpointing)
    model = get_peft_model(llama(), CONFIGS["rode"]())
    model.load_state_dict(trainer.model.state_dict())
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    want = model.train()(**{k: v for k, v in batch.items() if k != "completion_mask"}).loss
    want.backward()
    torch.testing.assert_close(loss, want)
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert any("router_weight" in n for n in grads)
    for name, p in trainer.model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("make", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("start", ["config", "model"])
def test_dpo_without_a_reference_model(make, start, tmp_path):
    """The reference is the base model, or for a model that has an adapter already, a copy of it."""
    trainer = started(dpo, make(), start, tmp_path)
    before = adapter_of(trainer.model)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0]
    if start == "model":  # the reference is a copy of the adapter
        assert found[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)
        copied = {n: p for n, p in trainer.model.named_parameters() if ".ref." in n}
        assert copied.keys() == {n.replace(".default.", ".ref.") for n in before}
        assert all(torch.equal(copied[n.replace(".default.", ".ref.")], p) for n, p in before.items())
        assert not any(p.requires_grad for p in copied.values())
    after = adapter_of(trainer.model)
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[n], after[n]) for n in before)
    trainer.save_model(tmp_path / "adapter")
    again = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(trainer.model))


def test_dpo_starts_where_the_base_model_is(tmp_path):
    torch.manual_seed(1)
    config = RodeConfig(task_type="CAUSAL_LM", ranks=(2, 4), dropout=0.0)
    trainer = dpo(llama(), tmp_path, peft_config=config)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), abs=1e-5)


def with_auxiliary_loss(output, labels, num_items_in_batch):
    logits = output.logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch + output.aux_loss


def test_sft_looks_at_no_auxiliary_loss_unless_it_is_told_to(tmp_path):
    """It computes its own loss. `compute_loss_func` brings the auxiliary loss in, and without it a warning says what is lost."""
    steps = []
    for more in ({}, {"compute_loss_func": with_auxiliary_loss}):
        torch.manual_seed(1)
        config = CONFIGS["rode"](gate="softmax", aux_loss="load-balance", aux_weight=10.0)
        trainer = sft(llama(), tmp_path, peft_config=config, **more)
        told = "this backward pass reaches the gates and not their auxiliary loss"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        assert any(told in str(w.message) for w in caught) == (not more)
        steps.append(losses(trainer)[0])
    assert steps[1] > steps[0] + 9  # a balanced router's loss is 1
