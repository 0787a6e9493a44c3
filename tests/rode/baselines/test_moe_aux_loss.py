"""The auxiliary loss on its way from layers to the model's output, on MoE-LLaVA's layers: values, checkpointing, accumulation."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from rode.baselines.moe_llava import convert_to_moe, moe_layers


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


def test_aux_loss_in_the_output(tiny_llava, llava_batch):
    model = moe_llava(tiny_llava, blocks=(0, 1), aux_loss=0.3)
    seen = []
    for layer in moe_layers(model).values():
        layer.register_forward_hook(lambda m, args, _: seen.append(F.linear(args[0], m.router.weight)))
    batch = labelled(llava_batch)
    output = model(**batch)
    valid = llava_batch["attention_mask"].bool()
    want = 0
    for logits in seen:
        p = logits[valid].softmax(-1)
        share = torch.stack([(p.argmax(-1) == e).double().mean() for e in range(4)])
        want = want + 0.3 * 4 * (p.mean(0) * share).sum()
    torch.testing.assert_close(output["aux_loss"].double(), want.double(), rtol=1e-5, atol=0)
    assert output.aux_loss is output["aux_loss"]
    logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
    entropy = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    torch.testing.assert_close(output.loss, entropy + output.aux_loss)

    part = model(**batch, num_items_in_batch=torch.tensor(40))
    n = (labels != -100).sum()
    torch.testing.assert_close(part.loss, (entropy + part.aux_loss) * n / 40)
    model.eval()
    assert "aux_loss" not in model(**batch)
    torch.testing.assert_close(model.train()(**llava_batch).aux_loss, output.aux_loss)


def test_checkpointing_changes_no_bit(tiny_llava, llava_batch):
    results = []
    for checkpointing in (False, True):
        model = moe_llava(tiny_llava, blocks=(0, 1), sample_second=True, capacity_factor=0.7, aux_loss=1.0)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        steps = []
        for _ in range(2):
            output = model(**labelled(llava_batch))
            steps.append((output.loss.detach(), output.aux_loss.detach(), gradients(model, output.loss)))
            assert next(iter(moe_layers(model).values())).context.records is None
        results.append(steps)
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain[0], again[0])
        assert torch.equal(plain[1], again[1])
        assert all(torch.equal(plain[2][name], again[2][name]) for name in plain[2])
    router = "model.language_model.layers.1.mlp.router.weight"
    assert plain[2][router].abs().sum() > 0


def test_another_pass_before_backward_changes_nothing(tiny_llava, llava_batch):
    found = []
    for checkpointing in (False, True):
        model = moe_llava(tiny_llava)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first = model(**labelled(llava_batch)).loss
        model(**{name: value[:1] for name, value in llava_batch.items()})
        found.append(gradients(model, first))
    assert all(torch.equal(found[0][name], grad) for name, grad in found[1].items())


def test_reentrant_checkpointing_is_refused(tiny_llava, llava_batch):
    model = moe_llava(tiny_llava)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match=r"'use_reentrant': False"):
        model(**labelled(llava_batch))
    model.gradient_checkpointing_disable()
    assert "aux_loss" in model(**labelled(llava_batch))


def test_accumulation(tiny_llava, llava_batch):
    """Of the cross-entropy two micro-batches make one big batch; of the auxiliary loss they make the mean by learned tokens."""
    batch = labelled(llava_batch)
    batch["labels"][1, :-1] = -100
    total = (batch["labels"][:, 1:] != -100).sum()
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in (0, 1)]
    counts = [(row["labels"][:, 1:] != -100).sum() for row in rows]
    assert counts[0] != counts[1]
    model = moe_llava(tiny_llava, capacity_factor=None, aux_loss=0.0)
    whole = gradients(model, model(**batch).loss)
    parts = [gradients(model, model(**row, num_items_in_batch=total).loss) for row in rows]
    for name, grad in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], grad, rtol=1e-4, atol=1e-6)
    model = moe_llava(tiny_llava, capacity_factor=None, aux_loss=0.5)
    router = next(iter(moe_layers(model).values())).router.weight
    summed = sum(model(**row, num_items_in_batch=total).loss for row in rows)
    mean = sum(model(**row).aux_loss * count / total for row, count in zip(rows, counts, strict=True))
    output = model(**batch)
    want = output.loss - output.aux_loss + mean
    assert (mean - output.aux_loss).abs() > 1e-4  # the loads of the whole batch are others
    torch.testing.assert_close(summed, want)
    for a, b in zip(torch.autograd.grad(summed, router), torch.autograd.grad(want, router), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_it_cannot_work_with(tiny_llava, llava_batch):
    model = moe_llava(tiny_llava)
    four = llava_batch["attention_mask"][:, None, None].bool().expand(-1, 1, 9, 9)
    with pytest.raises(ValueError, match=r"expected shape \(batch, tokens\), .* got \(2, 1, 9, 9\)"):
        model(**{**llava_batch, "attention_mask": four})
    with pytest.raises(ValueError, match="return_dict=True"):
        model(**llava_batch, return_dict=False)
    hooks = len(model._forward_pre_hooks)
    next(iter(moe_layers(model).values())).context.attach(model)
    assert len(model._forward_pre_hooks) == hooks  # once is enough


def test_detached_and_after_an_error(tiny_llava, llava_batch):
    model = moe_llava(tiny_llava)
    context = next(iter(moe_layers(model).values())).context
    want = model(**llava_batch).aux_loss
    broken = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**llava_batch)
    assert context.records is None
    broken.remove()
    assert torch.equal(model(**llava_batch).aux_loss, want)
    context.detach()
    assert "aux_loss" not in model(**llava_batch)
