"""Examples that cannot be used are found before training, named, and left out or fatal."""

from __future__ import annotations

import dataclasses
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from odd_dishes import dishes
from rode.training import usable as usable_module
from rode.training.config import _warn_once, load_experiment
from rode.training.train import train
from rode.training.usable import Encodable, drop_unusable, split_unusable, usable
from rode.vlm import PromptEncoder
from rode.vlm.families import family_of
from rode.vlm.load import read_processor
from rode_food import Example, Source, load_examples, write_records
from rode_food.shards.write import write_shards
from tiny_llava import tiny_processor
from tiny_vlms import save_tiny_vlm


@pytest.fixture
def bad(tmp_path):
    """Paths of pictures that cannot be used."""
    Image.new("RGB", (500, 1)).save(tmp_path / "long.png")
    (tmp_path / "empty.png").touch()
    return [str(tmp_path / name) for name in ("gone.jpg", "empty.png", "long.png")]


def test_pictures_and_answers(bad, examples):
    mixed = [*examples[:2], *(dataclasses.replace(examples[i + 2], image=path) for i, path in enumerate(bad))]
    mixed.append(
        dataclasses.replace(mixed[2], task="recipe")
    )  # a second question about the first bad picture
    mixed.append(dataclasses.replace(examples[5], more_images=(examples[0].image, bad[0])))
    mixed.append(dataclasses.replace(examples[6], answer=" \n"))
    kept, lines = drop_unusable(mixed, on_bad_record="skip")
    assert kept == examples[:2]
    assert lines[0] == f"record dish2: {bad[0]}: no such picture"
    assert "500 x 1 pixels" in lines[2]
    assert lines[3:] == [
        f"record dish5: {bad[0]}: no such picture",
        "record dish6: task category: the answer is empty",
    ]
    message = r"record dish2: .*gone.jpg: no such picture \(and 4 more\); .* data.on_bad_record=skip"
    with pytest.raises(ValueError, match=message):
        drop_unusable(mixed)
    assert drop_unusable(examples) == (examples, [])
    without = [dataclasses.replace(examples[0], image="")]
    assert drop_unusable(without) == (without, [])
    with pytest.raises(ValueError, match="on_bad_record: expected 'error' or 'skip', got 'ignore'"):
        drop_unusable(mixed, on_bad_record="ignore")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.text("xyz ", max_size=4)), max_size=12))
def test_the_first_check_that_objects_is_heard(texts):
    examples = [Example(id, "", "question", "?", text, text, "s", None) for id, text in texts]

    def long(example):
        return "too long" if len(example.answer) > 2 else None

    def spaced(example):
        return "a space" if " " in example.answer else None

    numbers, lines = split_unusable(examples, [long, spaced])
    assert numbers == [i for i, (_, text) in enumerate(texts) if len(text) > 2 or " " in text]
    want = [f"record {texts[i][0]}: {'too long' if len(texts[i][1]) > 2 else 'a space'}" for i in numbers]
    assert lines == list(dict.fromkeys(want))


def no_soup(example):
    return "it is a soup" if example.task == "category" and example.answer == "soup" else None


@pytest.mark.parametrize("most", [1, 2, 3])
def test_shards_are_asked_for_further_checks_alone(tmp_path, monkeypatch, caplog, most):
    records = dishes(tmp_path / "pictures", 12, split="train")
    write_shards(records, tmp_path / "shards")
    write_records(tmp_path / "r.jsonl", records)
    mixture = load_examples([Source(str(tmp_path / name)) for name in ("shards", "r.jsonl")], "train")
    whole = [list(part) for part in mixture.parts()]
    unchanged, skipped = usable(mixture, "error")
    assert (list(unchanged.examples), skipped) == ([*whole[0], *whole[1]], [])
    with pytest.raises(ValueError, match=r"record .*: it is a soup \(and 3 more\); mend the record"):
        usable(mixture, "error", [no_soup])
    kept, skipped = usable(mixture, "skip", [no_soup])
    assert len(skipped) == 8
    assert caplog.text.count("it is a soup") == 8
    for part, before in zip(kept.parts(), whole, strict=True):
        assert list(part) == [example for example in before if not no_soup(example)]
    shards = kept.parts()[0]
    assert shards.lengths.tolist() == [len(e.question) + len(e.answer) for e in shards]
    packs = shards.packed(most)
    assert [example for pack in packs for example in pack] == list(shards)
    assert all(len({e.record_id for e in pack}) == 1 and len(pack) <= most for pack in packs)
    assert packs.lengths.sum() == shards.lengths.sum()
    with pytest.raises(ValueError, match="no example left to train on: 24 problems"):
        usable(mixture, "skip", [lambda example: "no"])


CONFIG = """
name: x
stage: adapter
model: {path: m}
data: {sources: [{path: a.jsonl}], KEY}
adapter: {ranks: [2, 2], gate: relu}
"""


def test_the_old_name_is_read_with_one_warning(tmp_path, caplog):
    _warn_once.cache_clear()
    (tmp_path / "old.yaml").write_text(CONFIG.replace("KEY", "on_bad_image: skip"))
    (tmp_path / "new.yaml").write_text(CONFIG.replace("KEY", "on_bad_record: error"))
    (tmp_path / "child.yaml").write_text("extends: new.yaml\ndata: {on_bad_image: skip}\n")
    with caplog.at_level(logging.WARNING):
        assert load_experiment(tmp_path / "old.yaml").data.on_bad_record == "skip"
        assert load_experiment(tmp_path / "new.yaml").data.on_bad_record == "error"
        assert load_experiment(tmp_path / "child.yaml").data.on_bad_record == "skip"
        later = load_experiment(tmp_path / "new.yaml", ["data.on_bad_image=skip"])
        assert later.data.on_bad_record == "skip"
    assert caplog.text.count("data.on_bad_image is called data.on_bad_record now") == 1


def test_a_prompt_that_leaves_no_room_is_found_before_the_first_step(make_experiment, food, caplog):
    """With the records that have it named, or left out; the others train."""
    texts = {"cut": "a short one", "long": "Is it good? " * 60}
    examples = [
        Example(f"{name}{i}", str(food / f"{i}.png"), "category", text, "rice", "rice", "s", "train")
        for name, text in texts.items()
        for i in range(4)
    ]
    experiment = make_experiment(training={"max_length": 250, "max_steps": 2})
    with pytest.raises(
        ValueError, match=r"record long0: task category: prompt and picture take \d+ tokens .* max_length=250"
    ):
        train(experiment, examples=examples, progress=False)
    experiment.data.on_bad_record = "skip"
    result = train(experiment, examples=examples, progress=False)
    assert [line.split(":")[0] for line in result.skipped] == [f"record long{i}" for i in range(4)]
    assert result.metrics["examples"] == 4


@pytest.mark.parametrize("text", ["<image>", "<s>salt</s>", "rice <pad>"])
def test_text_that_looks_like_a_control_token_trains_and_resumes(make_experiment, food, text):
    examples = [
        Example(f"r{i}", str(food / f"{i}.png"), "category", f"Is it {text}?", text, text, "s", "train")
        for i in range(4)
    ]
    result = train(
        make_experiment(training={"max_steps": 3, "save_steps": 2}), examples=examples, progress=False
    )
    longer = make_experiment(training={"max_steps": 5, "save_steps": 2})
    again = train(longer, examples=examples, resume=True, progress=False)
    assert (result.metrics["steps"], again.metrics["steps"]) == (3, 5)


@pytest.mark.parametrize("limit", [0, 1])
def test_the_estimate_of_a_rows_length_is_the_rows(tmp_path, limit):
    """Just too long, and just short enough: the answer is that of the row itself, for pictures of several sizes."""
    processor, config = read_processor(save_tiny_vlm("qwen2.5-vl", tmp_path / "model"))
    paths = []
    for i, size in enumerate([(20, 20), (60, 25), (31, 90)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.new("RGB", size).save(paths[-1])
    for path in paths:
        example = Example("r", path, "category", "What is it?", "rice", "rice", "s", "train")
        family = family_of(config)
        length = len(
            PromptEncoder(processor, family=family)
            .encode(example.question, example.answer, [Image.open(path)])
            .input_ids
        )
        encoder = PromptEncoder(processor, "auto", length - limit, "error", family)
        problem = Encodable(encoder)(example)
        assert (problem is None) == (limit == 0)
        if problem is not None:
            assert f"{length} tokens do not fit max_length={length - 1}" in problem


def test_pooled_pictures_take_fewer_tokens(food):
    example = load_examples([Source(str(food / "records.jsonl"), tasks=["category"])], "train").examples[0]
    processor = tiny_processor()
    for pool, fits in ((1, False), (2, True)):  # 4 tokens and 1
        length = PromptEncoder(processor, "vicuna").text_length(example.question)
        encoder = PromptEncoder(processor, "vicuna", max_length=length + 2)
        problem = Encodable(encoder, pool=pool)(example)
        assert (problem is None) == fits


def test_texts_that_cannot_be_encoded_and_rows_beyond_the_models_positions(
    make_experiment, examples, tmp_path, caplog
):
    """They are named before the first step, although training.max_length sets no limit."""
    mixed = [
        dataclasses.replace(examples[0], answer="half \ud83c of it"),
        dataclasses.replace(examples[1], question="\udf55?"),
        dataclasses.replace(
            examples[2], answer="long " * 400
        ),  # 2,000 tokens; the model has positions for 1,024
        *examples[3:],
    ]
    with pytest.raises(
        ValueError, match=r"record dish0: task category: the answer cannot be encoded: .*\(and 2 more\)"
    ):
        train(make_experiment(), examples=mixed, progress=False)
    result = train(
        make_experiment(data={"on_bad_record": "skip"}, training={"max_steps": 1}),
        examples=mixed,
        progress=False,
    )
    assert result.metrics["examples"] == 9
    first, second, third = result.skipped
    assert first == (
        "record dish0: task category: the answer cannot be encoded: character 6 is '\\ud83c', half of a surrogate pair; "
        "write the whole character"
    )
    assert second.startswith("record dish1: task category: the question cannot be encoded: character 1 is")
    assert "tokens, and the model has positions for 1024; set training.max_length to at most 1024" in third
    experiment = make_experiment(
        training={"max_length": 1024, "max_steps": 1},
        output_dir=str(tmp_path / "cut"),
        data={"on_bad_record": "skip"},
    )
    assert train(experiment, examples=mixed, progress=False).metrics["examples"] == 10


def test_a_row_as_long_as_the_models_positions(examples):
    processor = tiny_processor()
    encoder = PromptEncoder(processor, "vicuna")
    example = examples[0]
    length = len(encoder.encode(example.question, example.answer, [Image.open(example.image)]).input_ids)
    assert Encodable(encoder, positions=length)(example) is None
    assert f"{length} tokens" in Encodable(encoder, positions=length - 1)(example)


def test_pictures_that_all_take_as_many_tokens_are_not_opened(examples, monkeypatch):
    """Where records lie in shards, opening their pictures would read all of the data before the first step."""
    monkeypatch.setattr(usable_module, "picture_size", lambda image: pytest.fail(f"opened {image}"))
    encoder = PromptEncoder(tiny_processor(), "vicuna")
    assert Encodable(encoder, positions=1024)(examples[0]) is None
