"""Prompts: their exact text, one prefix for training and generation, and what is cut where room is short."""

from __future__ import annotations

import pickle

import pytest
import torch
from PIL import Image

from rode.vlm import Features, PromptEncoder, render_prompt
from tiny_llava import CHATML, tiny_processor

FOUR = [Features(torch.zeros(5, 1), 4)]  # a picture of four tokens
ONE = [Features(torch.zeros(2, 1), 1)]

# As llava-hf's checkpoints carry it: content in typed parts, "ASSISTANT: answer".
LLAVA_HF = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}"
    "{% endfor %}{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STYLES = [("vicuna", None), ("auto", None), ("chat_template", CHATML), ("auto", LLAVA_HF)]


def hf_processor():
    processor = tiny_processor()
    processor.chat_template = LLAVA_HF
    return processor


def processor_for(template):
    return hf_processor() if template is LLAVA_HF else tiny_processor(template)


def test_vicuna_is_llava_15s_text():
    prompt = render_prompt(tiny_processor(), "What is it?", "vicuna")
    assert prompt.prefix == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT:"
    )
    assert prompt.separator == " "


def test_templates():
    chatml = render_prompt(tiny_processor(CHATML), "What?", "auto")
    assert chatml.prefix == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert chatml.separator == ""
    hf = render_prompt(hf_processor(), "What?", "auto")
    assert hf.prefix == "USER: <image>\nWhat? ASSISTANT:"
    assert hf.separator == " "


@pytest.mark.parametrize(("style", "template"), STYLES)
def test_training_and_generation_share_the_prefix(style, template):
    processor = processor_for(template)
    encoder = PromptEncoder(processor, style)
    encoded = encoder.encode("What is it?", "rice, beans", FOUR)
    prefix = encoder.encode_prompt("What is it?", FOUR).input_ids
    assert encoded.input_ids[: encoded.prompt_length] == prefix
    assert prefix.count(processor.image_token_id) == 4
    separator = render_prompt(processor, "What is it?", style).separator
    assert (
        processor.tokenizer.decode(encoded.input_ids[encoded.prompt_length :])
        == f"{separator}rice, beans</s>"
    )


def test_the_processor_itself_gives_the_same_ids():
    processor = tiny_processor()
    prompt = render_prompt(processor, "What is it?", "vicuna").prefix
    expanded = processor.tokenizer(prompt.replace("<image>", "<image>" * 4)).input_ids
    assert PromptEncoder(processor, "vicuna").encode_prompt("What is it?", FOUR).input_ids == expanded


def test_a_template_that_writes_bos_gets_no_second_one():
    processor = tiny_processor("{{ bos_token }}" + CHATML)
    ids = PromptEncoder(processor).encode_prompt("What?", ONE).input_ids
    assert ids.count(processor.tokenizer.bos_token_id) == 1
    assert ids[0] == processor.tokenizer.bos_token_id


def test_a_long_answer_is_cut_and_nothing_else():
    encoder = PromptEncoder(tiny_processor(), "vicuna")
    whole = encoder.encode("What?", "rice and beans", FOUR)
    room = whole.prompt_length + 5
    cut = PromptEncoder(tiny_processor(), "vicuna", max_length=room).encode("What?", "rice and beans", FOUR)
    assert cut.truncated
    assert cut.input_ids == whole.input_ids[:room]
    assert cut.prompt_length == whole.prompt_length
    assert cut.input_ids[-1] != tiny_processor().tokenizer.eos_token_id  # the answer does not end here
    exact = PromptEncoder(tiny_processor(), "vicuna", max_length=len(whole.input_ids))
    assert exact.encode("What?", "rice and beans", FOUR).input_ids == whole.input_ids


def test_where_nothing_may_be_cut():
    processor = tiny_processor()
    prompt = len(PromptEncoder(processor, "vicuna").encode_prompt("What?", FOUR).input_ids)
    strict = PromptEncoder(processor, "vicuna", max_length=prompt + 5, on_long_answer="error")
    with pytest.raises(ValueError, match=r"record r7: \d+ tokens do not fit max_length=\d+"):
        strict.encode("What?", "rice and beans", FOUR, "r7")
    for policy in ("truncate", "error"):
        full = PromptEncoder(processor, "vicuna", max_length=prompt, on_long_answer=policy)
        with pytest.raises(ValueError, match=rf"record r7: prompt and picture take {prompt} tokens"):
            full.encode("What?", "rice", FOUR, "r7")


def test_errors():
    processor = tiny_processor()
    with pytest.raises(ValueError, match="expected one of vicuna, chat_template, auto, got 'vicunya'"):
        render_prompt(processor, "What?", "vicunya")
    with pytest.raises(ValueError, match="has a chat template"):
        render_prompt(processor, "What?", "chat_template")
    with pytest.raises(ValueError, match="on_long_answer"):
        PromptEncoder(processor, on_long_answer="cut")
    with pytest.raises(ValueError, match="the chat template leaves out the question"):
        render_prompt(tiny_processor("{% for m in messages %}hello{% endfor %}"), "What?", "auto")
    blind = PromptEncoder(tiny_processor("{% for m in messages %}{{ m['content'][8:] }}{% endfor %}"))
    with pytest.raises(ValueError, match=r"has 0 image tokens '<image>' for 1 picture"):
        blind.encode_prompt("What?", FOUR)


@pytest.mark.parametrize("text", ["<image>", "<s>", "</s>", "less <s>salt</s> or <pad>"])
@pytest.mark.parametrize(("style", "template"), STYLES)
def test_text_that_looks_like_a_control_token_is_text(style, template, text):
    """Its ids are those of its characters (the tokenizer here has a token for each byte), in questions and in answers."""
    processor = processor_for(template)
    encoder = PromptEncoder(processor, style)
    picture = Image.new("RGB", (40, 40))
    letters = [processor.tokenizer.convert_tokens_to_ids("Ġ" if c == " " else c) for c in text]
    row = encoder.encode(f"Is {text} right?", text, [picture])
    prompt, answer = row.input_ids[: row.prompt_length], row.input_ids[row.prompt_length :]
    blank = encoder.encode("Is X right?", "X", [picture])
    x = processor.tokenizer.convert_tokens_to_ids("X")
    at = blank.input_ids.index(x)
    assert prompt == [*blank.input_ids[:at], *letters, *blank.input_ids[at + 1 : blank.prompt_length]]
    after = blank.input_ids[blank.prompt_length :]
    at = after.index(x)
    assert answer == [*after[:at], *letters, *after[at + 1 :]]
    assert row.input_ids.count(encoder.image_token_id) == 4
    assert row.vision["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_question_may_have_several_pictures_or_none(count):
    processor = tiny_processor()
    row = PromptEncoder(processor, "vicuna").encode("What?", "rice", [Image.new("RGB", (40, 40))] * count)
    assert row.input_ids.count(processor.image_token_id) == 4 * count
    assert ("pixel_values" in row.vision) == (count > 0)
    if count:
        assert len(row.vision["pixel_values"]) == count


def test_an_encoder_survives_pickling():
    encoder = PromptEncoder(tiny_processor(), "vicuna", max_length=300)
    encoder.encode("What?", "rice", FOUR)
    again = pickle.loads(pickle.dumps(encoder))
    assert again.encode("What?", "rice", FOUR).input_ids == encoder.encode("What?", "rice", FOUR).input_ids
    assert again.max_length == 300
