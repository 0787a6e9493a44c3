"""The loss on answers against the model's own."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from rode import RodeConfig
from rode.vlm import PixelSource, PromptEncoder, TrainingCollator, answer_loss
from tiny_llava import tiny_model, tiny_processor


def make_batch(examples):
    processor = tiny_processor()
    batch = TrainingCollator(PromptEncoder(processor, "vicuna"), PixelSource(processor))(examples)
    batch.pop("truncated")
    return batch, batch.pop("labels")


@pytest.mark.parametrize("adapted", [False, True])
def test_equal_to_the_plain_loss(examples, adapted):
    batch, labels = make_batch(examples[:5])
    model = tiny_model()
    if adapted:
        model = get_peft_model(model, RodeConfig(ranks=(2, 3), dropout=0.0, init_weights=False))
    trained = [p for p in model.parameters() if p.requires_grad]
    plain = model(**batch, labels=labels).loss
    expected = torch.autograd.grad(plain, trained, allow_unused=True)
    loss = answer_loss(model, model.get_output_embeddings(), batch, labels)
    torch.testing.assert_close(loss, plain, rtol=2e-6, atol=0)
    for actual, wanted in zip(torch.autograd.grad(loss, trained, allow_unused=True), expected, strict=True):
        assert (actual is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-7)
    # the hook is gone: the head sees every position again
    assert model(**batch).logits.shape[:2] == labels.shape


def test_parts_of_a_batch_add_up_to_its_token_mean(examples):
    model = tiny_model()
    batch, labels = make_batch(examples[:3])  # answers of unlike length
    whole = answer_loss(model, model.lm_head, batch, labels)
    tokens = (labels != -100).sum()
    parts = [
        answer_loss(
            model, model.lm_head, {k: v[i : i + 1] for k, v in batch.items()}, labels[i : i + 1], tokens
        )
        for i in range(3)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=2e-6, atol=0)


def test_16_bit_logits_are_summed_in_float32(examples):
    batch, labels = make_batch(examples[:2])
    model = tiny_model().bfloat16()
    loss = answer_loss(model, model.lm_head, batch, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(**batch, labels=labels).loss, rtol=1e-3, atol=0)


def test_a_batch_that_teaches_nothing_is_zero(examples):
    batch, labels = make_batch(examples[:2])
    model = tiny_model()
    assert answer_loss(model, model.lm_head, batch, torch.full_like(labels, -100)).item() == 0.0
