"""The server as the official client sees it: answers are those of `rode generate`, alone and in crowds."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from rode.evaluation.generate import answer
from serving import ask, data_url, need_serve, plate

need_serve()

QUESTIONS = ("What is it?", "What is this dish made of, and how?", "Is it hot?", "Ist das süß? 寿司 🍣")
COLOURS = ((220, 30, 30), (30, 220, 30), (30, 30, 220), (120, 10, 200))


def generated(served, question, pictures, tmp_path, tokens=24):
    """The answer of `rode generate`'s function."""
    paths = []
    for index, picture in enumerate(pictures):
        paths.append(str(tmp_path / f"{index}.png"))
        picture.save(paths[-1])
    with served.active() as model:
        return answer(
            model, served.encoder.processor, [paths], [question], prompt="vicuna", max_new_tokens=tokens
        )[0]


def test_models_are_the_base_and_every_adapter(client, base_name):
    assert [model.id for model in client.models.list()] == ["lora", "rode", base_name]
    assert client.models.retrieve("rode").owned_by == "rode"


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_an_answer_is_what_generate_gives(client, reference, tmp_path, pictures):
    shown = [plate(colour) for colour in COLOURS[:pictures]]
    messages = ask(QUESTIONS[1], *(data_url(picture) for picture in shown))
    seen = set()
    for name, served in reference.items():
        got = client.chat.completions.create(model=name, messages=messages, max_tokens=24)
        assert got.choices[0].message.content == generated(served, QUESTIONS[1], shown, tmp_path)
        tokens = got.usage.completion_tokens
        assert tokens == 24 if got.choices[0].finish_reason == "length" else tokens <= 24
        assert got.usage.total_tokens == got.usage.prompt_tokens + tokens
        assert got.model == name
        seen.add(got.choices[0].message.content)
    assert len(seen) == 3  # each adapter says something of its own


def test_a_stream_is_the_same_answer(client):
    messages = ask(QUESTIONS[3], data_url(plate(COLOURS[0])))
    whole = client.chat.completions.create(model="rode", messages=messages, max_tokens=40)
    stream = client.chat.completions.create(
        model="rode", messages=messages, max_tokens=40, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len(chunks) > 10  # not all at once


def test_a_crowd_gets_the_answers_that_each_gets_alone(client, server, base_name):
    """Sixteen clients, three models, prompts and answers of many lengths."""
    asked = [
        (name, QUESTIONS[i % 4] + " Really?" * (i % 3), COLOURS[i % 4], 5 + 7 * (i % 5))
        for i in range(16)
        for name in ("rode", "lora", base_name)
    ]

    def one(name, question, colour, tokens):
        messages = ask(question, data_url(plate(colour)))
        got = client.chat.completions.create(model=name, messages=messages, max_tokens=tokens)
        return got.choices[0].message.content

    alone = [one(*each) for each in asked]
    before = server.metrics.batches._sum.get()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(lambda each: one(*each), asked)) == alone
    assert server.metrics.batches._sum.get() - before == len(asked)
    assert len(set(alone)) > 30
    # some of them were answered together
    text = client.with_options(base_url=str(client.base_url)[:-3]).get("metrics", cast_to=str)
    count = next(line for line in text.splitlines() if line.startswith("rode_batch_size_count"))
    assert float(count.split()[1]) < float(before) + len(asked)
