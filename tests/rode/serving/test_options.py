"""What a request may ask for beside an answer: stop strings, chance, schemas, earlier turns, tasks."""

from __future__ import annotations

import json

import pytest

from serving import ask, data_url, need_serve, plate

need_serve()

PICTURE = data_url(plate((30, 220, 30)))


@pytest.fixture
def say(client):
    """A function that asks `rode` and gives the choice."""

    def asked(question="What is it?", model="rode", **options):
        options = {"max_tokens": 40, "messages": ask(question, PICTURE)} | options
        return client.chat.completions.create(model=model, **options).choices[0]

    return asked


def test_stop_strings(say, client):
    whole = say().message.content
    stop = whole[len(whole) // 2 :][:2]
    cut = say(stop=[stop, "no such text"])
    assert cut.message.content == whole[: whole.index(stop)].strip()
    assert cut.finish_reason == "stop"
    stream = client.chat.completions.create(
        model="rode", messages=ask("What is it?", PICTURE), max_tokens=40, stop=stop, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == cut.message.content


def test_chance_has_a_seed(say):
    greedy = say().message.content
    drawn = [say(temperature=1.5, seed=seed).message.content for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2]
    assert len({greedy, *drawn}) == 3
    assert say(temperature=1.5, top_p=1e-6, seed=5).message.content == greedy
    assert say(temperature=0, seed=5).message.content == greedy
    assert say(temperature=1.5).message.content != say(temperature=1.5).message.content


def test_rows_of_a_batch_draw_by_themselves(reference):
    """Greedy, drawn and held to a schema in one batch: each as it is alone."""
    from rode.serving.batch import Job, Piece, run
    from rode.serving.choice import Sampling

    served = reference["rode"]
    schema = {"type": "object", "properties": {"fat": {"type": "integer"}}, "required": ["fat"]}

    def jobs():
        prepared = [served.prepare("What is it?" * n, None, []) for n in (1, 2, 3, 1)]
        options = [
            {},
            {"sampling": Sampling(1.3, 0.9, 7)},
            {"matcher": served.grammars.matcher(schema, "schema")},
            {"sampling": Sampling(1.3, 1.0, 7), "stops": ("e",)},
        ]
        events = [[] for _ in prepared]
        made = [
            Job(served, p, 30 + i, e.append, **o)
            for i, (p, e, o) in enumerate(zip(prepared, events, options, strict=True))
        ]
        return made, events

    def outcome(events):
        return "".join(e.text for e in events if isinstance(e, Piece)), events[-1]

    together, events = jobs()
    run(together)
    alone, apart = jobs()
    for job in alone:
        run([job])
    assert [outcome(e) for e in events] == [outcome(e) for e in apart]
    assert list(json.loads(outcome(events[2])[0])) == ["fat"] or outcome(events[2])[1].reason == "length"


NUTRITION = {
    "type": "object",
    "properties": {
        name: {"type": "integer", "minimum": 0, "maximum": 9999} for name in ("energy", "mass", "fat")
    },
    "required": ["energy", "mass", "fat"],
    "additionalProperties": False,
}
INGREDIENTS = {
    "type": "object",
    "properties": {"ingredients": {"type": "array", "items": {"enum": ["rice", "süß 🍣"]}, "maxItems": 3}},
    "required": ["ingredients"],
    "additionalProperties": False,
}


def schema(value):
    return {"type": "json_schema", "json_schema": {"name": "dish", "strict": True, "schema": value}}


@pytest.mark.parametrize("temperature", [0, 1.9])
@pytest.mark.parametrize("model", ["rode", "lora"])
def test_an_answer_is_held_to_its_schema(say, model, temperature):
    """A model with random weights would not write a bracket by itself."""
    for value, keys in ((NUTRITION, ["energy", "mass", "fat"]), (INGREDIENTS, ["ingredients"])):
        got = say(model=model, response_format=schema(value), max_tokens=150, temperature=temperature, seed=3)
        assert got.finish_reason == "stop"
        found = json.loads(got.message.content)
        assert list(found) == keys
        if value is NUTRITION:
            assert all(type(v) is int and 0 <= v <= 9999 for v in found.values())
        else:
            assert set(found["ingredients"]) <= {"rice", "süß 🍣"}
            assert len(found["ingredients"]) <= 3


def test_a_trained_answer_is_read_into_json():
    from rode.serving.answers import as_json

    said = "mass 250 g, energy 312.5 kcal, fat 8 g, protein 12 g, carbohydrate 40 g"
    assert as_json("nutrition", said, ["energy", "mass"]) == (
        '{"energy":312.5,"mass":250,"fat":8,"protein":12,"carb":40}'
    )
    assert as_json("ingredients", "rice, süß, rice") == '{"ingredients":["rice","süß"]}'
    assert as_json("nutrition", "I do not know") is None


def test_with_a_task_the_schema_is_of_what_the_trained_answer_says(say, client, monkeypatch, server):
    """The model is random, so that the reader is told what it read."""
    import openai

    from rode.serving import answers, app

    monkeypatch.setattr(app, "as_json", lambda task, text, order: answers.as_json(task, "rice, bread", order))
    free = {"type": "object", "properties": {"ingredients": {"type": "array", "items": {"type": "string"}}}}
    options = {"extra_body": {"task": "ingredients"}, "stop": say().message.content[3]}
    got = say(response_format=schema(free), **options)
    assert json.loads(got.message.content) == {"ingredients": ["rice", "bread"]}
    stream = client.chat.completions.create(
        model="rode",
        messages=ask("What is it?", PICTURE),
        response_format=schema(free),
        stream=True,
        **options,
    )
    assert "".join(c.choices[0].delta.content or "" for c in stream) == got.message.content
    with pytest.raises(openai.InternalServerError, match="does not fit the schema") as caught:
        say(response_format=schema(NUTRITION), **options)
    assert caught.value.code == "answer_not_in_schema"
    with pytest.raises(openai.InternalServerError, match="was cut at max_tokens=2"):
        say(response_format=schema(free), max_tokens=2, extra_body={"task": "ingredients"})


def test_earlier_turns_are_part_of_the_question(say):
    first = say("What is it?").message.content
    turns = [
        *ask("What is it?", PICTURE),
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And how much?"},
    ]
    from rode_food.records import Turn
    from rode_food.tasks import in_context

    written = in_context([Turn("What is it?", first)], "And how much?")
    assert say(messages=turns).message == say(written).message
