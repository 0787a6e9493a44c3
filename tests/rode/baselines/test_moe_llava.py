"""MoE-LLaVA's layer against a formula for one token at a time, and its way through a tiny LLaVA, checkpointing and files."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
from torch import nn

from rode.baselines.moe_llava import (
    MoeConfig,
    MoeFeedForward,
    convert_to_moe,
    load_balance_loss,
    load_moe,
    moe_layers,
    save_moe,
)
from rode.tuner.context import ForwardContext


class Ffn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10, dtype=torch.float64)
        self.down = nn.Linear(10, 6, dtype=torch.float64)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def layer_of(**fields):
    """A float64 layer with experts that differ, as after training."""
    torch.manual_seed(0)
    layer = MoeFeedForward(Ffn(), MoeConfig(sample_second=False, **fields), 6, ForwardContext())
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.6)
    return layer


def token_by_token(layer, x, valid, factor):
    """One token after the other, one choice after the other; also which (token, choice) found no place."""
    config = layer.config
    rows, flags = x.reshape(-1, x.shape[-1]), valid.flatten().tolist()
    capacity = math.inf
    if factor is not None:
        capacity = max(
            math.ceil(sum(flags) / config.num_experts * (config.top_k * factor)), config.min_capacity
        )
    probabilities, wishes = [], []
    for row in rows:
        exp = [torch.exp((weight * row).sum()) for weight in layer.router.weight]
        probabilities.append([e / sum(exp) for e in exp])
        wishes.append(sorted(range(len(exp)), key=lambda e: -exp[e].item())[: config.top_k])
    taken, served, dropped = [0] * config.num_experts, {}, []
    for choice in range(config.top_k):
        for t in range(len(rows)):
            if not flags[t]:
                continue
            expert = wishes[t][choice]
            if taken[expert] < capacity:
                taken[expert] += 1
                served.setdefault(t, []).append(expert)
            else:
                dropped.append((t, choice))
    out = []
    for t, row in enumerate(rows):
        experts = served.get(t, [])
        total = sum(probabilities[t][e] for e in experts) if config.top_k > 1 else 1
        y = torch.zeros_like(row)
        for e in experts:
            y = y + probabilities[t][e] / total * layer.experts[e](row)
        out.append(y)
    return torch.stack(out).reshape(x.shape), dropped


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize(
    ("fields", "drops"),
    [
        ({"capacity_factor": None}, False),
        ({"capacity_factor": 1.5}, False),
        ({"capacity_factor": 0.5}, True),
        ({"capacity_factor": 0.1, "min_capacity": 3}, True),
        ({"capacity_factor": 0.6, "top_k": 1}, True),
        ({"capacity_factor": 0.6, "top_k": 3, "num_experts": 5}, True),
    ],
    ids=str,
)
def test_values_and_gradients(fields, drops, padding):
    layer = layer_of(**fields).train()
    torch.manual_seed(3)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    valid = torch.ones(2, 9, dtype=torch.bool)
    if padding:
        valid[1, :4] = False
        layer.context.passes.last.mask = valid
    y = layer(x)
    want, dropped = token_by_token(layer, x, valid, fields["capacity_factor"])
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    assert bool(dropped) == drops
    if drops and fields["capacity_factor"] == 0.5:  # some lose one expert, some both
        lost = [t for t, _ in dropped]
        assert len(set(lost)) < len(lost)
        assert any(lost.count(t) == 1 for t in lost)
    dy = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad(y, inputs, dy)
    for g, w in zip(got, torch.autograd.grad(want, inputs, dy, materialize_grads=True), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)
    assert not got[0][~valid].any()


def test_at_inference_no_token_is_dropped_unless_asked():
    for factor in (None, 0.4):
        layer = layer_of(capacity_factor=0.1, eval_capacity_factor=factor).eval()
        x = torch.randn(1, 12, 6, dtype=torch.float64)
        want, dropped = token_by_token(layer, x, torch.ones(1, 12, dtype=torch.bool), factor)
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)
        assert bool(dropped) == (factor is not None)
    layer = layer_of(capacity_factor=0.1).eval()
    alone = torch.cat([layer(x[:, t : t + 1]) for t in range(12)], dim=1)
    torch.testing.assert_close(layer(x), alone)


def test_equal_copies_without_limit_are_the_dense_ffn():
    dense = Ffn()
    layer = MoeFeedForward(dense, MoeConfig(capacity_factor=None), 6, ForwardContext()).train()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-12)


def test_the_second_expert_is_drawn_from_the_softmax_over_the_others():
    layer = MoeFeedForward(Ffn(), MoeConfig(), 6, ForwardContext()).train()
    logits = torch.tensor([1.0, 0.5, -0.5, 3.0])
    many, n = logits.expand(40000, 4), 40000
    torch.manual_seed(0)
    chosen, kept = layer._choose(many, torch.ones(n, dtype=torch.bool))
    assert (chosen[:, 0] == 3).all()
    share = chosen[:, 1].bincount(minlength=4) / n
    want = torch.cat((logits[:3].softmax(0), torch.zeros(1)))
    torch.testing.assert_close(share, want, rtol=0, atol=4 * math.sqrt(0.25 / n))
    assert kept[:, 0].sum() == n * 2 * 1.5 / 4  # everyone wants expert 3
    assert kept[: int(n * 0.75), 0].all()
    layer.eval()
    assert (layer._choose(many, torch.ones(n, dtype=torch.bool))[0] == torch.tensor([3, 0])).all()


def test_load_balance_loss():
    torch.manual_seed(0)
    p = torch.randn(7, 3, dtype=torch.float64).softmax(-1).requires_grad_()
    first, valid = p.argmax(-1), torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool()
    want = 0
    for e in range(3):
        rows = [t for t in range(7) if valid[t]]
        want = want + 3 * sum(p[t, e] for t in rows) / 5 * sum(int(first[t] == e) for t in rows) / 5
    got = load_balance_loss(p, first, valid)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip(torch.autograd.grad(got, p), torch.autograd.grad(want, p), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    even = torch.full((6, 3), 1 / 3)
    assert load_balance_loss(even, torch.arange(6) % 3, torch.ones(6).bool()) == pytest.approx(1)


def labelled(batch):
    ids = batch["input_ids"]
    return {**batch, "labels": ids.masked_fill((ids == 100) | (batch["attention_mask"] == 0), -100)}


def moe_llava(tiny_llava, **fields):
    torch.manual_seed(5)
    model = tiny_llava()
    convert_to_moe(model, **{"sample_second": False, **fields})
    return model.train()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_what_is_replaced_and_what_trains(tiny_llava):
    model = moe_llava(tiny_llava)
    assert list(moe_layers(model)) == ["model.language_model.layers.0.mlp"]
    dense = tiny_llava().model.language_model.layers[0].mlp.state_dict()
    for expert in model.model.language_model.layers[0].mlp.experts:
        assert all(torch.equal(tensor, dense[name]) for name, tensor in expert.state_dict().items())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if "language_model.layers.0.mlp." in n}
    assert len(trained) == 1 + 4 * 3
    both = moe_llava(tiny_llava, blocks=(0, 1), num_experts=2)
    assert [len(layer.experts) for layer in moe_layers(both).values()] == [2, 2]


def test_padding_changes_nothing(tiny_llava, llava_batch):
    """A row's values and the auxiliary loss are those of the rows without their padding, when capacity is no limit."""
    model = moe_llava(tiny_llava, capacity_factor=None)
    row = {name: value[1:] for name, value in llava_batch.items()}
    short = {**row, "input_ids": row["input_ids"][:, 2:], "attention_mask": row["attention_mask"][:, 2:]}
    padded, bare = model(**row), model(**short)
    torch.testing.assert_close(padded.aux_loss, bare.aux_loss)
    torch.testing.assert_close(padded.logits[:, 2:], bare.logits, rtol=1e-4, atol=1e-5)


def test_no_token_still_gives_a_gradient(tiny_llava, llava_batch):
    model = moe_llava(tiny_llava, num_experts=12, capacity_factor=None)
    grads = gradients(model, model(**labelled(llava_batch)).loss)  # raises where a gradient is None
    assert any(not grad.any() for name, grad in grads.items() if "experts" in name)


def train(model, batch, steps):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_saves_and_loads(tiny_llava, llava_batch, tmp_path, dtype):
    torch.manual_seed(5)
    model = tiny_llava().to(dtype)
    convert_to_moe(model)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = {**llava_batch, "pixel_values": llava_batch["pixel_values"].to(dtype)}
    losses = train(model.train(), labelled(batch), 30)
    assert losses[-1] < 0.5 * losses[0]
    frozen = tiny_llava().to(dtype).state_dict()
    state = model.state_dict()
    replaced = "language_model.layers.0.mlp."
    assert all(torch.equal(state[name], t) for name, t in frozen.items() if replaced not in name)

    save_moe(model, tmp_path)
    again = tiny_llava().to(dtype)
    load_moe(again, tmp_path)
    assert again.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert torch.equal(again.eval()(**batch).logits, model.eval()(**batch).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    want = model.generate(**batch, **options)
    assert torch.equal(again.generate(**batch, **options), want)
    assert torch.equal(again.generate(**batch, **options, use_cache=False), want)


def test_a_deep_copy_is_whole(tiny_llava, llava_batch):
    model = moe_llava(tiny_llava)
    twin = copy.deepcopy(model)
    layer = next(iter(moe_layers(twin).values()))
    assert layer.context is not next(iter(moe_layers(model).values())).context
    assert torch.equal(twin(**llava_batch).aux_loss, model(**llava_batch).aux_loss)


def test_plain_decoder_and_trainer(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, vocab_size=11
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    convert_to_moe(model, num_experts=2)
    assert [name.split(".")[2] for name in moe_layers(model)] == ["0", "2"]
    ids = torch.arange(8) % 11
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}] * 8
    arguments = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=3e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < history[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts": 1}, "num_experts: expected a whole number of at least 2, got 1"),
        ({"top_k": 5}, "top_k: expected at most num_experts=4, got 5"),
        ({"capacity_factor": -1.0}, "capacity_factor: expected a number of at least 0"),
        ({"capacity_factor": 0}, "capacity_factor: 0 would drop every token"),
        ({"aux_loss": None}, "aux_loss: expected a number"),
        ({"blocks": ()}, "blocks: expected numbers of blocks"),
        ({"blocks": (0, 2)}, r"blocks: expected distinct numbers from 0 to 1, got \(0, 2\)"),
        ({"blocks": (0, 0)}, "blocks: expected distinct numbers"),
    ],
    ids=str,
)
def test_what_cannot_be(tiny_llava, fields, message):
    with pytest.raises((TypeError, ValueError), match=message):
        convert_to_moe(tiny_llava(), **fields)


def test_errors_of_models_and_files(tiny_llava, tmp_path):
    model = moe_llava(tiny_llava)
    with pytest.raises(ValueError, match="mixtures already"):
        convert_to_moe(model)
    with pytest.raises(ValueError, match="expected a LLaVA or a decoder"):
        convert_to_moe(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no mixture to save"):
        save_moe(tiny_llava(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"moe_config\.json is missing"):
        load_moe(tiny_llava(), tmp_path)
    save_moe(model, tmp_path)
    values = json.loads((tmp_path / "moe_config.json").read_text())
    (tmp_path / "moe_config.json").write_text(json.dumps({**values, "num_experts": 6}))
    with pytest.raises(ValueError, match="it was saved from another base model"):
        load_moe(tiny_llava(), tmp_path)
    (tmp_path / "moe_config.json").write_text(json.dumps({**values, "method": "other"}))
    with pytest.raises(ValueError, match="expected method 'moe-llava'"):
        load_moe(tiny_llava(), tmp_path)
