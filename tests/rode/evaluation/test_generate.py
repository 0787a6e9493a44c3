"""Generation: what was taught is answered, batches answer as single questions do, answers end where they end."""

from __future__ import annotations

import pytest
from torch.profiler import ProfilerActivity, profile

from rode.evaluation.generate import answer
from rode.vlm import FeatureSource, load_adapter, load_vlm
from rode.vlm.load import base_model

QUESTIONS = ["What is it?", "What is this dish made of, and how?", "Is it hot?"]


def test_three_dishes_are_told_apart(taught):
    result, examples = taught
    answers = answer(
        result.model,
        result.processor,
        [e.image for e in examples],
        [e.question for e in examples],
        prompt="vicuna",
        max_new_tokens=30,
    )
    assert answers == [e.answer for e in examples]  # and no longer: EOS was learned too


def test_the_adapter_on_disk_answers_alike(taught, llava_dir):
    result, examples = taught
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    images, questions = [e.image for e in examples[:3]], [e.question for e in examples[:3]]
    before = answer(model, processor, images, questions, prompt="vicuna", max_new_tokens=15)
    assert not set(before) & {e.answer for e in examples}
    model = load_adapter(model, result.output_dir)
    assert answer(model, processor, images, questions, prompt="vicuna", max_new_tokens=15) == [
        e.answer for e in examples[:3]
    ]


def test_batched_equals_single(taught):
    result, examples = taught
    model, processor = result.model, result.processor
    pairs = [(example.image, question) for example in examples[:3] for question in QUESTIONS]
    images, questions = map(list, zip(*pairs, strict=True))
    options = {"prompt": "vicuna", "max_new_tokens": 20}
    single = [answer(model, processor, [i], [q], **options)[0] for i, q in pairs]
    assert len(set(single)) >= 3
    for size in (2, 9):
        assert answer(model, processor, images, questions, batch_size=size, **options) == single
    cached = FeatureSource(model, processor)
    assert answer(model, processor, images, questions, source=cached, **options) == single


def test_the_checkpoints_own_end_tokens_count_too(taught, monkeypatch):
    result, examples = taught
    space = result.processor.tokenizer("a b", add_special_tokens=False).input_ids[1]
    monkeypatch.setattr(result.model.generation_config, "eos_token_id", [2, space])
    image = next(e.image for e in examples if e.answer == "apple pie")
    # the answer's first token is the blank that stands before it
    assert answer(result.model, result.processor, [image], ["What is it?"], prompt="vicuna") == [""]


def test_errors(taught, examples):
    model, processor = taught[0].model, taught[0].processor
    with pytest.raises(ValueError, match="expected as many, got 1 and 2"):
        answer(model, processor, [examples[0].image], ["a", "b"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        answer(model, processor, [], [], batch_size=0)
    with pytest.raises(FileNotFoundError, match="no such picture"):
        answer(model, processor, ["gone.png"], ["a"])
    assert answer(model, processor, [], []) == []


def test_the_heads_weight_is_not_copied_for_each_prompt(taught):
    result, examples = taught
    head = base_model(result.model).get_output_embeddings()
    images, questions = [e.image for e in examples[:3]], ["What is it?"] * 3
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as operations:
        answer(result.model, result.processor, images, questions, prompt="vicuna", max_new_tokens=3)
    weight = list(reversed(head.weight.shape))
    second = [
        (event.name, event.input_shapes[1]) for event in operations.events() if event.name.endswith("mm")
    ]
    assert ("aten::mm", weight) in second
    assert ("aten::bmm", [3, *weight]) not in second
    assert not head._forward_pre_hooks
