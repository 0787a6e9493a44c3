"""What is served: a trained run with its projector, the base beside it, and pooled features."""

from __future__ import annotations

import pytest
from PIL import Image

from rode.commands.options import saved_experiment
from rode.evaluation.generate import answer
from rode.training.experiment import ModelConfig
from rode.vlm import load_vlm
from rode.vlm.image_features import feature_source
from serving import need_serve

need_serve()

from rode.serving.batch import Failed, Job, Piece, run  # noqa: E402
from rode.serving.errors import ApiError  # noqa: E402
from rode.serving.models import Found, adapters_in, load_models  # noqa: E402


def asked(served, questions, tokens=20, task=None):
    """The answers to (picture, question) pairs in one batch."""
    events = [[] for _ in questions]
    jobs = []
    for (path, question), happened in zip(questions, events, strict=True):
        with Image.open(path) as image:
            prepared = served.prepare(question, task, [image.convert("RGB")])
        jobs.append(Job(served, prepared, tokens, happened.append))
    run(jobs)
    return ["".join(e.text for e in happened if isinstance(e, Piece)) for happened in events]


def test_a_trained_run_and_its_base(taught, llava_dir):
    result, examples = taught
    folder = result.output_dir
    assert adapters_in(folder) == [folder]
    models = load_models(None, [Found(folder, saved_experiment(str(folder)).model)])
    assert list(models) == ["run", llava_dir.name]
    questions = [(e.image, e.question) for e in examples]
    assert asked(models["run"], questions) == [e.answer for e in examples]
    # the base has its own projector again
    plain, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    images, texts = map(list, zip(*questions, strict=True))
    want = answer(plain, processor, images, texts, prompt="vicuna", max_new_tokens=20)
    assert asked(models[llava_dir.name], questions) == want
    assert asked(models["run"], questions) == [e.answer for e in examples]


def test_pooled_features(adapters, llava_dir, food):
    config = ModelConfig(
        path=str(llava_dir),
        dtype="float32",
        device="cpu",
        prompt="vicuna",
        picture_pool=2,
        vision_features="memory",
    )
    served = load_models(None, [Found(adapters / "rode", config)])["rode"]
    questions = [(str(food / f"{i}.png"), f"What is it? {i}") for i in (0, 7, 15)]
    got = asked(served, questions)
    source = feature_source(served.model, served.encoder.processor, pool=2)
    images, texts = map(list, zip(*questions, strict=True))
    want = answer(
        served.model,
        served.encoder.processor,
        images,
        texts,
        prompt="vicuna",
        max_new_tokens=20,
        source=source,
    )
    assert got == want
    assert len(set(got)) == 3
    with Image.open(questions[0][0]) as image:
        long = served.prepare("a" * 2000, None, [image.convert("RGB")])
    happened: list = []
    run([Job(served, long, 5, happened.append)])
    assert isinstance(happened[0], Failed)
    assert happened[0].error.code == "context_length_exceeded"


def test_a_router_that_reads_tasks_is_told_one(llava_dir, tmp_path):
    from rode.tuner import RodeConfig
    from serving import save_adapter

    config = RodeConfig(
        ranks=(2, 4),
        gate="softmax",
        router_input="task",
        num_ids=4,
        target_modules=r".*language_model.*\.q_proj",
        task_type="CAUSAL_LM",
    )
    folder = save_adapter(llava_dir, tmp_path / "tasks", config, 3)
    served = load_models(
        str(llava_dir), [Found(folder, None)], dtype="float32", device="cpu", prompt="vicuna"
    )["tasks"]
    with pytest.raises(ApiError, match=r"task: expected one of ingredients, recipe, .* got None"):
        served.prepare("What is it?", None, [])
    answers = []
    for task in ("nutrition", "recipe"):
        happened: list = []
        run([Job(served, served.prepare("What is it?", task, []), 20, happened.append)])
        answers.append("".join(e.text for e in happened if isinstance(e, Piece)))
    assert answers[0] != answers[1]


def test_a_folder_of_the_models_name(adapters, llava_dir, tmp_path):
    import shutil

    folder = tmp_path / llava_dir.name
    shutil.copytree(adapters / "rode", folder)
    models = load_models(str(llava_dir), [Found(folder, None)], dtype="float32", device="cpu")
    assert list(models) == [llava_dir.name, f"{llava_dir.name}-base"]
    assert models[f"{llava_dir.name}-base"].adapter is None
