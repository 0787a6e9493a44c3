"""The tiny checkpoints that other tests train on: each loads by the auto classes, and reads pictures of any shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText

from rode.vlm.processor import load_processor
from tiny_vlms import TINY_VLMS, save_tiny_vlm

QUESTIONS = ("what?", "how much is it?")


def picture(width: int, height: int, colour: tuple[int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height), colour)
    image.paste((255 - colour[0], 10, 90), (width // 4, height // 4, width // 2, height // 2))
    return image


def prompt(processor: Any, question: str) -> str:
    if processor.chat_template is None:
        return f"<image>{question}"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def inputs(processor: Any, questions: tuple[str, ...], pictures: list[Image.Image]) -> dict[str, Any]:
    batch = processor(
        text=[prompt(processor, question) for question in questions],
        images=[[image] for image in pictures],
        padding=True,
        return_tensors="pt",
    )
    return {name: value for name, value in batch.items() if name != "labels"}  # PaliGemma makes its own


@pytest.mark.parametrize("name", TINY_VLMS)
def test_checkpoint_loads_learns_and_generates(name: str, tmp_path: Path) -> None:
    save_tiny_vlm(name, tmp_path)
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tmp_path),
        load_processor(tmp_path, AutoConfig.from_pretrained(tmp_path)),
    )
    assert type(processor).__name__ == type(model).__name__.replace("ForConditionalGeneration", "Processor")
    pictures = [picture(20, 20, (200, 30, 60)), picture(60, 25, (10, 180, 120))]
    batch = inputs(processor, QUESTIONS, pictures)

    model.train()
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.get_input_embeddings().weight.grad.any()
    model.eval()
    with torch.no_grad():
        logits = model(**batch).logits[:, -1]
        for row, (question, image) in enumerate(zip(QUESTIONS, pictures, strict=True)):
            alone = model(**inputs(processor, (question,), [image])).logits[:, -1]
            torch.testing.assert_close(alone[0], logits[row], atol=1e-4, rtol=1e-4)
        other = model(**inputs(processor, QUESTIONS[:1], [picture(20, 20, (0, 255, 0))])).logits[:, -1]
        assert (other[0] - logits[0]).abs().max() > 0.1  # the picture reaches the answer
    generated = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert generated.shape == (2, batch["input_ids"].shape[1] + 3)


@pytest.mark.parametrize("name", TINY_VLMS)
def test_text_survives_the_tokenizer_and_an_answer_ends_as_the_family_ends_it(
    name: str, tmp_path: Path
) -> None:
    save_tiny_vlm(name, tmp_path)
    processor = load_processor(tmp_path, AutoConfig.from_pretrained(tmp_path))
    text = "Crème brûlée:\n  2 eggs"
    tokenizer = processor.tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    if processor.chat_template is not None:
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "rice"}]},
        ]
        whole = processor.apply_chat_template(messages)
        assert whole.startswith(prompt(processor, "what?"))
        end = whole.rpartition("rice")[2].strip()
        ends = AutoModelForImageTextToText.from_pretrained(tmp_path).generation_config.eos_token_id
        assert tokenizer.convert_tokens_to_ids(end) == ends[0]


def test_the_same_weights_every_time(tmp_path: Path) -> None:
    one, two = (save_tiny_vlm("gemma3", tmp_path / str(i)) / "model.safetensors" for i in range(2))
    assert one.read_bytes() == two.read_bytes()
