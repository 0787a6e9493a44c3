"""Questions packed behind one picture teach what they teach apart."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from peft import get_peft_model

from rode import RodeConfig
from rode.vlm import PixelSource, PromptEncoder, TrainingCollator, answer_loss
from rode.vlm.packing import attention_of, pack_by_picture, packed_attention
from tiny_llava import tiny_model, tiny_processor

QUESTIONS = [
    ("What is it?", "soup"),
    ("What is in it?", "rice, leaf"),
    ("How much?", "mass 320 g, energy 410 kcal"),
]


@pytest.fixture
def packs(examples):
    """Three packs: of three questions, of two, of one."""
    return [
        tuple(dataclasses.replace(example, question=q, answer=a) for q, a in QUESTIONS[:count])
        for example, count in zip(examples, (3, 2, 1), strict=False)
    ]


def collator(template=None, style="vicuna"):
    processor = tiny_processor(template)
    return TrainingCollator(PromptEncoder(processor, style), PixelSource(processor)), processor


def loss_and_gradients(model, batch):
    inputs = {
        name: tensor for name, tensor in batch.items() if name not in ("labels", "truncated", "segments")
    }
    head = model.get_output_embeddings()
    if "segments" in batch:
        with packed_attention(model.get_base_model().model.language_model, batch["segments"]):
            loss = answer_loss(model, head, inputs, batch["labels"])
    else:
        loss = answer_loss(model, head, inputs, batch["labels"])
    trained = [p for p in model.parameters() if p.requires_grad]
    return loss, torch.autograd.grad(loss, trained)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_loss_and_gradients_of_separate_rows(packs, attention):
    collate, _ = collator()
    model = tiny_model()
    model.set_attn_implementation(attention)
    config = RodeConfig(
        ranks=(2, 3), dropout=0.0, init_weights=False, modules_to_save=["multi_modal_projector"]
    )
    model = get_peft_model(model, config)
    apart, together = collate([e for pack in packs for e in pack]), collate(packs)
    assert "segments" not in apart
    assert together["input_ids"].shape[0] == 3
    assert (together["labels"] != -100).sum() == (apart["labels"] != -100).sum()
    expected, wanted = loss_and_gradients(model, apart)
    loss, gradients = loss_and_gradients(model, together)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    for actual, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-6)
    # without the mask the questions see each other, which shows
    del together["segments"]
    assert abs(loss_and_gradients(model, together)[0] - expected) > 1e-3


def test_a_packed_row(packs):
    collate, processor = collator()
    batch = collate(packs)
    row, labels = batch["input_ids"][0], batch["labels"][0]
    segments, positions = batch["segments"][0], batch["position_ids"][0]
    assert (row == processor.image_token_id).sum() == 4  # the picture stands once
    for number, (question, answer) in enumerate(QUESTIONS, start=1):
        own = segments == number
        assert processor.tokenizer.decode(labels[own & (labels != -100)]) == f" {answer}</s>"
        alone = collate([dataclasses.replace(packs[0][0], question=question, answer=answer)])["input_ids"][0]
        seen = (segments == 0) | own
        assert torch.equal(row[seen], alone)
        assert torch.equal(positions[seen], torch.arange(len(alone)))
    assert segments[-1] == 3
    assert batch["segments"][2][-1] == -1


def test_who_sees_whom():
    allowed = attention_of(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert allowed == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_packs_by_picture(examples):
    a, b = examples[:2]
    assert pack_by_picture([a, b, a, a, b, a], 3) == [(a, a, a), (b, b), (a,)]
    assert pack_by_picture([a, a], 1) == [(a,), (a,)]
    assert pack_by_picture([], 4) == []


def test_equal_questions_keep_a_token_of_their_own(examples):
    collate, _ = collator()
    batch = collate([(examples[0], dataclasses.replace(examples[0], answer="cake"))])
    assert batch["segments"][0].max() == 2
    assert (batch["labels"][0] != -100).sum() == len(" rice and beans") + len(" cake") + 2


def test_a_question_before_the_picture_cannot_be_shared(packs):
    template = "{% for m in messages %}{{ m['content'][8:] }}<image>{% endfor %}:"
    collate, _ = collator(template, "auto")
    collate([packs[2]])  # a single question may stand anywhere
    with pytest.raises(ValueError, match="questions_per_picture: this prompt puts the question before"):
        collate(packs)
