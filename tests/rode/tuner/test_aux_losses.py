"""Auxiliary losses against their formulas, and on their way to the training loss."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from rode.tuner import HoldSparsity, RodeConfig, RodeLayer

FIELDS = {
    "load-balance": {"gate": "topk", "top_k": 2, "normalize": True, "aux_loss": "load-balance"},
    "softmax": {"gate": "softmax", "aux_loss": "load-balance"},
    "threshold": {"gate": "threshold", "normalize": True, "aux_loss": "load-balance"},
    "importance": {"gate": "softmax", "aux_loss": "importance"},
    "groups": {"gate": "softmax", "aux_loss": "importance", "aux_groups": (1, 0), "aux_delta": 0.3},
    "l1": {"gate": "relu", "aux_loss": "l1"},
    "target": {"gate": "relu", "aux_loss": "l1", "target_sparsity": 0.7},
}
TASKS = torch.tensor([1, 0])


def adapted(tiny_llava, name, **fields):
    torch.manual_seed(4)
    common = {
        "ranks": (2, 3, 2),
        "dropout": 0.0,
        "init_weights": False,
        "aux_weight": 0.5,
        "task_type": "CAUSAL_LM",
    }
    return get_peft_model(tiny_llava(), RodeConfig(**{**common, **FIELDS[name], **fields}))


def labels_of(batch):
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :7] = -100
    return labels


def formula(name, layer, x, mask):
    """The loss of one router from its input x (B, T, K) and mask (B, T), token by token."""
    router = layer.adapter("default").router_weight
    n = len(router)
    rows, by_sequence = [], []
    for b in range(2):
        total = torch.zeros(n, dtype=x.dtype)
        for t in range(x.shape[1]):
            if not mask[b, t]:
                continue
            h = router @ x[b, t]
            p = torch.exp(h) / torch.exp(h).sum()
            if name in ("l1", "target"):
                rows.append((torch.clamp(h, min=0), (h > 0).to(x.dtype)))
            elif name == "load-balance":
                chosen = torch.zeros(n, dtype=x.dtype)
                chosen[h.topk(2).indices] = 1
                rows.append((p, chosen))
            elif name == "threshold":
                z = (
                    layer.adapter("default").threshold_weight[0] @ x[b, t]
                    + layer.adapter("default").threshold_bias[0]
                )
                above = p - torch.sigmoid(z) / n
                rows.append((above, (above >= 0).to(x.dtype)))
            else:
                chosen = torch.zeros(n, dtype=x.dtype)
                chosen[p.argmax()] = 1
                rows.append((p, chosen))
            total = total + rows[-1][0]
        by_sequence.append(total)
    values, chosen = (torch.stack(part) for part in zip(*rows, strict=True))
    if name == "l1":
        return values.sum(1).mean()
    if name == "target":
        return sum(values[:, i].mean() * chosen[:, i].mean() / 0.3 for i in range(n))
    if name == "importance":
        total = values.sum(0)
        return total.var() / total.mean() ** 2
    if (
        name == "groups"
    ):  # experts 0 and 1 are group 0, expert 2 is group 1; the sequences' groups are 0 and 1
        M = torch.stack(
            (by_sequence[0] * torch.tensor([1.3, 1.3, 0.7]), by_sequence[1] * torch.tensor([0.7, 0.7, 1.3]))
        )
        return M.flatten().var() / M.mean() ** 2
    return n * sum(values[:, i].mean() * chosen[:, i].mean() for i in range(n))


@pytest.mark.parametrize("name", FIELDS)
def test_losses_are_their_formulas_without_padding(tiny_llava, llava_batch, name):
    model = adapted(tiny_llava, name).double().train()
    batch = {**llava_batch, "pixel_values": llava_batch["pixel_values"].double()}
    inputs = {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, RodeLayer)]
    for n, layer in layers:
        layer.register_forward_hook(lambda m, args, out, n=n: inputs.update({n: args[0]}))
    out = model(**batch, labels=labels_of(batch), rode_task_ids=TASKS)
    mask = batch["attention_mask"].bool()
    want = 0.5 * sum(formula(name, layer, inputs[n], mask) for n, layer in layers) / len(layers)
    torch.testing.assert_close(out.aux_loss, want, rtol=1e-5, atol=1e-8)
    routers = [layer.adapter("default").router_weight for _, layer in layers]
    mine = torch.autograd.grad(out.aux_loss, routers, retain_graph=True)
    theirs = torch.autograd.grad(want, routers)
    for a, b in zip(mine, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    # what is added to the loss, and that nothing is added in evaluation
    plain = model.eval()(**batch, labels=labels_of(batch))
    torch.testing.assert_close(out.loss, plain.loss + out.aux_loss)
    assert "aux_loss" not in plain


@pytest.mark.parametrize("name", ["load-balance", "l1", "groups"])
def test_checkpointing_gives_the_same_loss_and_gradients(tiny_llava, llava_batch, name):
    results = []
    for checkpointing in (False, True):
        model = adapted(tiny_llava, name).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        loss = model(**llava_batch, labels=labels_of(llava_batch), rode_task_ids=TASKS).loss
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.requires_grad]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_reentrant_checkpointing_says_that_the_loss_is_left_out(tiny_llava, llava_batch):
    model = adapted(tiny_llava, "l1").train()
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.warns(UserWarning, match="auxiliary loss is left out"):
        out = model(**llava_batch, labels=labels_of(llava_batch))
    assert "aux_loss" not in out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FIELDS)
def test_a_backward_pass_without_the_loss_says_so(tiny_llava, llava_batch, name, checkpointing, recwarn):
    """A trainer that computes its loss from the logits leaves `output.loss` aside, and the auxiliary loss with it."""
    model = adapted(tiny_llava, name).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = {**llava_batch, "labels": labels_of(llava_batch), "rode_task_ids": TASKS}

    def told():
        found = [str(w.message) for w in recwarn.list if "aux_loss: this backward pass" in str(w.message)]
        recwarn.clear()
        return found

    model(**batch).loss.backward()
    output = model(**batch)
    (output.logits.square().mean() + output.aux_loss).backward()
    with torch.no_grad():
        model(**batch)
    assert not told()
    model(**batch).logits.square().mean().backward()
    assert len(told()) == 1


def test_accumulated_batches_count_by_their_learned_tokens(tiny_llava, llava_batch):
    """Two micro-batches with the count of both, as Trainer passes it: sum of losses = CE of all + share-weighted losses."""
    model = adapted(tiny_llava, "l1").train()
    labels = labels_of(llava_batch)
    labels[1, :8] = -100  # 2 tokens learned in the first row, 1 in the second
    total = (labels[:, 1:] != -100).sum()
    both = model(**llava_batch, labels=labels, num_items_in_batch=total)
    ce = both.loss - both.aux_loss
    parts, aux = [], []
    for row in range(2):
        one = {name: t[row : row + 1] for name, t in llava_batch.items()}
        out = model(**one, labels=labels[row : row + 1], num_items_in_batch=total)
        parts.append(out.loss)
        aux.append(out.aux_loss)
    want = ce + 2 / 3 * aux[0] + 1 / 3 * aux[1]
    torch.testing.assert_close(sum(parts), want, rtol=1e-4, atol=1e-6)


def test_a_tuple_carries_the_loss_too(tiny_llava, llava_batch):
    model = adapted(tiny_llava, "l1").train()
    labels = labels_of(llava_batch)
    want = model(**llava_batch, labels=labels).loss
    assert torch.equal(model(**llava_batch, labels=labels, return_dict=False)[0], want)
    with pytest.raises(ValueError, match="return_dict=True"):
        model(**llava_batch, return_dict=False)


def test_groups_need_the_tasks(tiny_llava, llava_batch):
    with pytest.raises(ValueError, match=r"aux_groups: .* pass rode_task_ids"):
        adapted(tiny_llava, "groups").train()(**llava_batch)


def test_one_expert_alone_is_balanced(tiny_llava, llava_batch):
    model = adapted(tiny_llava, "importance", ranks=(4,), gate="sigmoid").train()
    out = model(**llava_batch, labels=labels_of(llava_batch))
    assert out.aux_loss == 0
    out.loss.backward()


class Rows(torch.utils.data.Dataset):
    def __init__(self, batch):
        self.rows = [{name: t[i] for name, t in batch.items()} for i in range(2)] * 4

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def trainer_of(model, batch, tmp_path, callbacks, steps, **fields):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=steps,
        per_device_train_batch_size=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        save_steps=3,
        **{"gradient_accumulation_steps": 2, "learning_rate": 1e-3, **fields},
    )
    data = Rows({**batch, "labels": labels_of(batch)})
    return Trainer(model=model, args=arguments, train_dataset=data, callbacks=callbacks)


def test_trainer_steers_to_the_target_and_resumes(tiny_llava, llava_batch, tmp_path):
    """About half of the gates are closed, less than 0.7: the weight grows by 1.2 with every optimizer step."""
    hold = HoldSparsity()
    trainer_of(adapted(tiny_llava, "target", aux_weight=1e-6), llava_batch, tmp_path, [hold], 3).train()
    assert hold.multiplier == pytest.approx(1.2**3)
    assert 0.2 < hold.sparsity < 0.7
    again = HoldSparsity()
    model = adapted(tiny_llava, "target", aux_weight=1e-6)
    trainer_of(model, llava_batch, tmp_path, [again], 4).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert again.multiplier == pytest.approx(1.2**4)
    closing = HoldSparsity(multiplier=64.0)
    model = adapted(tiny_llava, "target", aux_weight=1e-6, target_sparsity=0.1)
    trainer_of(model, llava_batch, tmp_path / "more", [closing], 2).train()
    assert closing.multiplier == pytest.approx(64 / 1.2**2)


def test_a_strong_l1_closes_gates(tiny_llava, llava_batch, tmp_path):
    model = adapted(tiny_llava, "l1", aux_weight=50.0)
    layer = next(m for m in model.modules() if isinstance(m, RodeLayer))
    before = layer.adapter("default").router_weight.detach().clone()
    trainer_of(
        model, llava_batch, tmp_path, [], 20, learning_rate=0.02, gradient_accumulation_steps=1
    ).train()
    seen = {}
    layer.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    model.eval()(**llava_batch)
    mask = llava_batch["attention_mask"].bool()
    gates = [
        (seen["x"] @ w.T).relu()[mask].sum(1).mean() for w in (before, layer.adapter("default").router_weight)
    ]
    assert gates[1] < 0.5 * gates[0]


def test_two_adapters_with_one_configuration_count_twice(tiny_llava, llava_batch):
    model = adapted(tiny_llava, "l1").train()
    one = model(**llava_batch, labels=labels_of(llava_batch)).aux_loss
    model.add_adapter("again", model.peft_config["default"])
    model.load_state_dict(
        {n.replace("default", "again"): p for n, p in model.state_dict().items() if ".default" in n},
        strict=False,
    )
    model.base_model.set_adapter(["default", "again"])
    both = model(**llava_batch, labels=labels_of(llava_batch)).aux_loss
    assert both > 1.5 * one


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([0, -1]), "below aux_groups=2, got -1"),
        (torch.tensor([0, 2]), "got 2"),
        (torch.tensor([0]), r"pass rode_task_ids \(2,\) to the model, got \(1,\)"),
    ],
)
def test_wrong_tasks_of_groups_are_named(tiny_llava, llava_batch, ids, words):
    with pytest.raises(ValueError, match=words):
        adapted(tiny_llava, "groups").train()(**llava_batch, rode_task_ids=ids)


def test_padding_that_cannot_be_told_is_an_error(tiny_llava, llava_batch):
    four = llava_batch["attention_mask"][:, None, None].bool().expand(-1, 1, 9, 9)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(batch, tokens\)"):
        adapted(tiny_llava, "importance").train()(**{**llava_batch, "attention_mask": four})


def test_a_models_own_auxiliary_loss_is_not_overwritten():
    from transformers.modeling_outputs import MoeCausalLMOutputWithPast

    from rode.tuner.aux_losses import add_to_output

    output = MoeCausalLMOutputWithPast(loss=torch.tensor(1.0), aux_loss=torch.tensor(2.0))
    with pytest.raises(ValueError, match="an auxiliary loss of its own"):
        add_to_output(output, torch.tensor(3.0), {})


def test_a_plain_dict_carries_the_loss_too():
    from rode.tuner.aux_losses import add_to_output

    output = add_to_output({"loss": torch.tensor(1.0)}, torch.tensor(3.0), {})
    assert output == {"loss": torch.tensor(4.0), "aux_loss": torch.tensor(3.0)}
    assert add_to_output({"logits": torch.zeros(1)}, torch.tensor(3.0), {})["aux_loss"] == 3.0
