"""Batches: what is learned, what is masked, on which side there is padding."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from rode.vlm import IGNORE, GenerationCollator, PixelSource, PromptEncoder, TrainingCollator
from tiny_llava import tiny_processor


def collator(**options):
    processor = tiny_processor()
    return TrainingCollator(PromptEncoder(processor, "vicuna", **options), PixelSource(processor)), processor


def test_labels_are_the_answer_and_its_end(examples):
    collate, processor = collator()
    batch = collate(examples[:3])
    tokenizer = processor.tokenizer
    for row, example in enumerate(examples[:3]):
        labels, ids, mask = (batch[name][row] for name in ("labels", "input_ids", "attention_mask"))
        learned = labels != IGNORE
        assert tokenizer.decode(labels[learned]) == f" {example.answer}</s>"
        assert torch.equal(labels[learned], ids[learned])  # the model shifts, not the collator
        assert mask[learned].all()
        assert not learned[ids == processor.image_token_id].any()
        assert int((ids == processor.image_token_id).sum()) == 4
        # right padding: ones, then zeros, and the padding learns nothing
        length = int(mask.sum())
        assert mask[:length].all()
        assert not mask[length:].any()
        assert (ids[length:] == tokenizer.pad_token_id).all()
        assert not learned[length:].any()
    assert batch["pixel_values"].shape == (3, 3, 28, 28)
    assert int(batch["truncated"]) == 0
    picture = PixelSource(processor).pixels(examples[1].image)
    assert torch.equal(batch["pixel_values"][1], picture)


def test_cut_answers_are_counted_and_warned_of_once(examples, caplog):
    _, processor = collator()
    picture = PixelSource(processor)(examples[0].image)
    prompt = PromptEncoder(processor, "vicuna").encode_prompt(examples[0].question, [picture]).prompt_length
    collate, _ = collator(max_length=prompt + 7)  # " soup" and its end fit, the other two dishes do not
    with caplog.at_level(logging.WARNING):
        batch = collate(examples[:3])
        collate(examples[:3])
    assert int(batch["truncated"]) == 2
    assert batch["input_ids"].shape[1] == prompt + 7
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 4, 4]
    assert [r.message.startswith("record dish0: the answer was cut") for r in caplog.records] == [True]


def test_generation_is_padded_on_the_left(examples):
    processor = tiny_processor()
    encoder = PromptEncoder(processor, "vicuna")
    questions = ["What?", "What is this dish made of?"]
    batch = GenerationCollator(encoder, PixelSource(processor))([e.images for e in examples[:2]], questions)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for row, question in enumerate(questions):
        alone = encoder.encode_prompt(question, [PixelSource(processor)(examples[row].image)]).input_ids
        assert ids[row, -len(alone) :].tolist() == alone
        assert mask[row].tolist() == [0] * (ids.shape[1] - len(alone)) + [1] * len(alone)


def test_a_picture_gone_during_the_run_is_named_with_its_record(examples):
    collate, _ = collator()
    gone = dataclasses.replace(examples[0], image="/nowhere/x.png")
    with pytest.raises(OSError, match=r"record dish0: /nowhere/x.png: no such picture"):
        collate([gone])
