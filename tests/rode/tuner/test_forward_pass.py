"""Several passes before one backward under checkpointing: a layer computed again reads what its own pass was called with."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from adapted_llava import TASK, adapted

KINDS = {
    "task": TASK,
    "sequence": {"gate": "softmax", "router_input": "sequence"},
    "expert choice": {"gate": "expert-choice", "capacity": 1.0},
    "block": {**TASK, "router_per": "block"},
}


def batches(llava_batch):
    """Two calls that differ in tasks, in prompts and in padding."""
    made = []
    for tasks, prompt, masked in (([0, 2], 6, 0), ([1, 1], 4, 1)):
        mask = llava_batch["attention_mask"].clone()
        mask[0, :masked] = 0
        labels = llava_batch["input_ids"].masked_fill(mask == 0, -100)
        labels[:, :prompt] = -100
        made.append({**llava_batch, "attention_mask": mask, "labels": labels, "tasks": torch.tensor(tasks)})
    return made


def call(model, batch):
    batch = dict(batch)
    tasks = batch.pop("tasks")
    config = model.active_peft_config
    return model(**batch, **({config.id_input: tasks} if config.id_input else {})).loss


def model_of(tiny_llava, name, use_reentrant=None):
    model = adapted(tiny_llava, **KINDS[name]).train()
    if use_reentrant is not None:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    return model


def gradients(model):
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any(grad.abs().max() > 0 for n, grad in grads.items() if n.endswith(("router_weight", "table")))
    return grads


def assert_close(found, want):
    assert found.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, -0.5)])
def test_two_passes_share_one_backward(tiny_llava, llava_batch, name, weights):
    grads = []
    for use_reentrant in (None, False):
        model = model_of(tiny_llava, name, use_reentrant)
        losses = [call(model, batch) for batch in batches(llava_batch)]
        sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
        grads.append(gradients(model))
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_backward_in_either_order(tiny_llava, llava_batch, name, use_reentrant, first):
    grads = []
    for checkpointing in (None, use_reentrant):
        model = model_of(tiny_llava, name, checkpointing)
        losses = [call(model, batch) for batch in batches(llava_batch)]
        losses[first].backward()
        losses[1 - first].backward()
        grads.append(gradients(model))
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_evaluation_in_between_changes_nothing(tiny_llava, llava_batch, use_reentrant):
    first, second = batches(llava_batch)
    grads = []
    for checkpointing in (None, use_reentrant):
        model = model_of(tiny_llava, "task", checkpointing)
        loss = call(model, first)
        with torch.no_grad():
            call(model, second)
        loss.backward()
        grads.append(gradients(model))
    assert_close(grads[1], grads[0])


def test_reentrant_checkpointing_of_two_passes_is_refused(tiny_llava, llava_batch):
    model = model_of(tiny_llava, "task", use_reentrant=True)
    losses = [call(model, batch) for batch in batches(llava_batch)]
    with pytest.raises(
        RuntimeError, match="2 forward passes wait for a backward under reentrant checkpointing"
    ):
        sum(losses).backward()


def test_losses_that_are_kept_do_not_matter(tiny_llava, llava_batch):
    model, kept = model_of(tiny_llava, "task", use_reentrant=True), []
    for batch in batches(llava_batch):
        kept.append(call(model, batch))
        kept[-1].backward()


def test_a_block_that_its_caller_checkpoints(tiny_llava, llava_batch):
    """torch.utils.checkpoint around a whole model, as a contrastive loss uses it."""
    grads = []
    for wrapped in (False, True):
        model = model_of(tiny_llava, "task")
        losses = [
            checkpoint(call, model, batch, use_reentrant=False) if wrapped else call(model, batch)
            for batch in batches(llava_batch)
        ]
        (losses[0] * losses[1]).backward()
        grads.append(gradients(model))
    assert_close(grads[1], grads[0])


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_a_graph_is_freed_with_its_loss(tiny_llava, llava_batch, use_reentrant):
    model = model_of(tiny_llava, "block", use_reentrant)
    loss = call(model, batches(llava_batch)[0])
    passes = model.base_model._context.passes
    alive = weakref.ref(passes.last)
    model.base_model._context.block_gates.clear()  # what the last pass keeps in any case
    passes.begin()
    assert alive() is not None
    del loss
    gc.collect()
    assert alive() is None
