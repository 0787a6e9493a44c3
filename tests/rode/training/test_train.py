"""Training a tiny LLaVA: what is trained and saved, resuming to the bit, interruption, order, token means."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from rode.training.arguments import checkpointing_options, training_arguments
from rode.training.checkpoints import latest_checkpoint
from rode.training.config import load_experiment
from rode.training.order import EpochSampler
from rode.training.train import train
from rode.vlm import FeatureSource, load_vlm
from rode_food.data_mixture import DataMixture


def weights(directory):
    return load_file(next(f for f in directory.iterdir() if f.suffix == ".safetensors"))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def losses(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def test_it_learns_and_saves_the_adapter_alone(make_experiment, examples, llava_dir):
    experiment = make_experiment(
        training={"max_steps": 40, "projector_learning_rate": 1e-2, "learning_rate": 1e-2, "save_steps": 20}
    )
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    frozen = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if "multi_modal_projector" not in name
    }
    result = train(experiment, examples=examples, model=model, processor=processor, progress=False)
    assert losses(result)[-1] < losses(result)[0] - 0.3
    assert not result.interrupted
    assert result.metrics["steps"] == 40
    state = model.state_dict()
    for name, tensor in frozen.items():
        wrapped = name.replace("q_proj.", "q_proj.base_layer.").replace("v_proj.", "v_proj.base_layer.")
        assert torch.equal(state[name if "vision_tower" in name else wrapped], tensor), name
    adapter = weights(result.output_dir)
    assert all(".rode_" in name or "multi_modal_projector" in name for name in adapter)
    # two layers of q (32 -> 32) and v (32 -> 16), ranks 2 + 4, router of two rows; the projector 16 -> 32 -> 32
    assert sum(t.numel() for t in adapter.values()) == 2 * (6 * 64 + 64 + 6 * 48 + 64) + (17 * 32 + 33 * 32)
    assert result.metrics["trainable_parameters"] == sum(t.numel() for t in adapter.values())
    checkpoint = latest_checkpoint(result.output_dir)
    assert checkpoint.name == "checkpoint-40"
    assert_same(weights(checkpoint), adapter)
    assert (
        sum(f.stat().st_size for f in checkpoint.iterdir()) < 200_000
    )  # optimizer and adapter, not 53,424 weights
    assert load_experiment(result.output_dir / "config.yaml") == experiment
    assert json.loads((result.output_dir / "history.json").read_text()) == result.history
    assert any(
        f.name.startswith("events.out.tfevents") for f in (result.output_dir / "tensorboard").iterdir()
    )
    gates = [entry["gates/open_image"] for entry in result.history if "loss" in entry]
    assert all(0 < rate < 1 for rate in gates)


def test_the_two_rates_reach_their_parameters(make_experiment, examples):
    experiment = make_experiment(
        adapter={"dropout": 0.0},
        training={
            "schedule": "constant",
            "warmup_steps": 0,
            "max_steps": 1,
            "projector_learning_rate": 1e-3,
            "learning_rate": 5e-2,
        },
    )
    result = train(experiment, examples=examples, progress=False)
    optimizer = torch.load(result.checkpoint / "optimizer.pt")
    assert sorted({group["lr"] for group in optimizer["param_groups"]}) == [1e-3, 5e-2]
    # Adam's first step moves every weight with a gradient by its rate: B starts at 0
    moved = [
        t.abs().max().item()
        for name, t in weights(result.output_dir).items()
        if name.endswith("rode_adapters.B")
    ]
    assert moved == pytest.approx([5e-2] * 4, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        # within the first epoch of 3 steps; dropout of 0.5 makes random numbers matter
        (
            {
                "training": {"max_steps": 8, "save_steps": 2, "projector_learning_rate": 1e-3},
                "adapter": {"dropout": 0.5},
            },
            2,
        ),
        # within the second epoch, ordered by length, accumulated
        (
            {
                "training": {
                    "max_steps": 8,
                    "save_steps": 5,
                    "group_by_length": True,
                    "batch_size": 2,
                    "gradient_accumulation": 2,
                }
            },
            5,
        ),
        # at the end of an epoch, in 16 bit, with checkpointing
        (
            {
                "training": {"max_steps": 7, "save_steps": 6, "gradient_checkpointing": True},
                "model": {"dtype": "bfloat16"},
            },
            6,
        ),
        ({"stage": "projector", "training": {"max_steps": 6, "save_steps": 4}}, 4),
    ],
)
def test_resume_is_bit_equal(make_experiment, examples, tmp_path, changes, stop):
    changes["training"]["save_total_limit"] = 10
    whole = train(make_experiment(**changes), examples=examples, progress=False)
    start = whole.output_dir / f"checkpoint-{stop}"
    experiment = make_experiment(**changes, output_dir=str(tmp_path / "second"))
    rest = train(experiment, examples=examples, resume=start, progress=False)
    assert_same(weights(rest.output_dir), weights(whole.output_dir))
    assert not torch.equal(*(next(iter(weights(d).values())) for d in (start, whole.output_dir)))
    assert losses(rest)[-1] == losses(whole)[-1]


def test_the_seed_decides(make_experiment, examples, tmp_path):
    runs = [
        weights(
            train(
                make_experiment(training={"max_steps": 3, "seed": seed}, output_dir=str(tmp_path / name)),
                examples=examples,
                progress=False,
            ).output_dir
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert_same(runs[0], runs[1])
    assert not torch.equal(next(iter(runs[0].values())), next(iter(runs[2].values())))


def test_accumulated_batches_are_one_batch(make_experiment, examples, tmp_path):
    """Answers differ in length: a mean of per-batch means would weigh their tokens unequally."""
    common = {"max_steps": 1, "warmup_steps": 0, "schedule": "constant"}
    whole, parts = (
        train(
            make_experiment(
                adapter={"dropout": 0.0},
                training={**common, "batch_size": size, "gradient_accumulation": 12 // size},
                output_dir=str(tmp_path / str(size)),
            ),
            examples=examples,
            progress=False,
        )
        for size in (12, 1)
    )
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    norms = [result.history[0]["grad_norm"] for result in (whole, parts)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_features_in_memory_train_as_pictures_do(make_experiment, examples, tmp_path, llava_dir):
    live, cached = (
        train(
            make_experiment(
                model={"vision_features": how}, training={"batch_size": 1}, output_dir=str(tmp_path / how)
            ),
            examples=examples,
            progress=False,
        )
        for how in ("live", "memory")
    )
    assert_same(weights(live.output_dir), weights(cached.output_dir))
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    shared = FeatureSource(model, processor)
    experiment = make_experiment(training={"batch_size": 1}, output_dir=str(tmp_path / "shared"))
    result = train(
        experiment, examples=examples, model=model, processor=processor, source=shared, progress=False
    )
    assert_same(weights(live.output_dir), weights(result.output_dir))


def test_an_interrupt_leaves_a_checkpoint_to_go_on_from(make_experiment, examples):
    experiment = make_experiment(training={"max_steps": 400, "save_steps": 3, "gate_statistics": False})
    directory = experiment.run_dir

    def interrupt():
        for _ in range(6000):  # a minute, then the assertions below say what happened
            if latest_checkpoint(directory) is not None:
                return os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    result = train(experiment, examples=examples, progress=False)
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    assert result.interrupted
    step = result.metrics["steps"]
    assert 3 <= step < 400
    assert result.checkpoint == directory / f"checkpoint-{step}"
    assert not (directory / "adapter_model.safetensors").exists()  # an unfinished run has no result
    assert not (directory / "training.json").exists()
    with pytest.raises(FileExistsError, match=rf"holds checkpoint-{step}: pass --resume"):
        train(experiment, examples=examples)
    # a short way on: the schedule is that of the longer run, the weights those of the checkpoint
    experiment.training.max_steps = step + 2
    rest = train(experiment, examples=examples, resume=True, progress=False)
    assert rest.metrics["steps"] == step + 2
    assert (directory / "adapter_model.safetensors").exists()
    recorded = json.loads((directory / "training.json").read_text())
    assert recorded["metrics"] == rest.metrics
    assert recorded["machine"].startswith("1 x cpu, ")


def test_the_mark_of_an_ended_training_goes_when_it_is_gone_on_with(make_experiment, examples, monkeypatch):
    experiment = make_experiment(training={"max_steps": 1})
    mark = train(experiment, examples=examples, progress=False).output_dir / "training.json"
    assert mark.exists()
    experiment.training.max_steps = 2
    monkeypatch.setattr("rode.training.train.AnswerTrainer.train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(experiment, examples=examples, resume=True, progress=False)
    assert not mark.exists()


def test_bad_pictures(make_experiment, examples, tmp_path, caplog):
    (tmp_path / "bad.png").write_bytes(b"no")
    spoiled = [
        *examples[:3],
        dataclasses.replace(examples[3], image=str(tmp_path / "bad.png")),
        *examples[4:],
    ]
    with pytest.raises(ValueError, match=r"record dish3: .*bad.png: not a readable picture"):
        train(make_experiment(), examples=spoiled, progress=False)
    experiment = make_experiment(data={"on_bad_record": "skip"}, training={"max_steps": 1})
    result = train(experiment, examples=spoiled, progress=False)
    assert result.metrics["examples"] == 11
    assert result.metrics["skipped_records"] == 1
    assert result.skipped[0].startswith("record dish3:")
    assert "left out: record dish3" in caplog.text
    alone = [spoiled[3]]
    with pytest.raises(ValueError, match="no example left to train on"):
        train(
            make_experiment(data={"on_bad_record": "skip"}, output_dir=str(tmp_path / "x")),
            examples=alone,
            progress=False,
        )


def test_cut_answers_are_counted(make_experiment, examples):
    from rode.vlm import PixelSource, PromptEncoder

    experiment = make_experiment(training={"max_steps": 3})
    _, processor = load_vlm(experiment.model.path, dtype="float32", device="cpu")
    picture = PixelSource(processor)(examples[0].image)
    prompt = PromptEncoder(processor, "vicuna").encode_prompt("What is it?", [picture]).prompt_length
    experiment.training.max_length = prompt + 7  # soup fits; apple pie and rice and beans do not
    result = train(experiment, examples=examples, progress=False)
    assert result.metrics["truncated_answers"] == 8  # one epoch of 12 examples


def test_sources_and_weights_from_records(make_experiment, food, tmp_path):
    source = {"path": str(food / "records.jsonl"), "tasks": ["category"]}
    experiment = make_experiment(
        data={"sources": [{**source, "name": "once"}, {**source, "name": "half", "weight": 0.5}]},
        training={"max_steps": None, "epochs": 2, "batch_size": 3},
    )
    result = train(experiment, progress=False)
    assert result.metrics["steps"] == 2 * 18 / 3


def test_questions_packed_behind_their_picture(make_experiment, tmp_path):
    """One epoch of all questions, apart and packed: the same tokens, hence the same first loss."""
    common = {"max_steps": None, "epochs": 1, "schedule": "constant", "warmup_steps": 0}
    apart, packed = (
        train(
            make_experiment(
                adapter={"dropout": 0.0},
                training={**common, "questions_per_picture": count, "batch_size": 48 // count},
                output_dir=str(tmp_path / str(count)),
            ),
            progress=False,
        )
        for count in (1, 4)
    )
    for result in (apart, packed):
        assert result.metrics["steps"] == 1
        assert result.metrics["examples"] == 48
    assert losses(packed) == pytest.approx(losses(apart), rel=1e-5)
    assert packed.history[0]["grad_norm"] == pytest.approx(apart.history[0]["grad_norm"], rel=1e-4)


def test_the_order_is_the_plans_and_like_stands_by_like():
    mixture = DataMixture([None] * 100, [100], [1.0], seed=3)
    sampler = EpochSampler(mixture.plan)
    assert list(sampler) == mixture.plan(0)
    sampler.set_epoch(4)
    assert list(sampler) == mixture.plan(4)
    lengths = [i % 7 for i in range(100)]
    grouped = EpochSampler(mixture.plan, lengths, batch_size=8, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        grouped.set_epoch(epoch)
        orders.append(list(grouped))
        assert sorted(orders[-1]) == list(range(100))
        batches = [[lengths[i] for i in orders[-1][k : k + 8]] for k in range(0, 100, 8)]
        assert all(max(batch) - min(batch) <= 1 for batch in batches)
        means = [sum(batch) / len(batch) for batch in batches]
        assert means not in (sorted(means), sorted(means, reverse=True))
    assert orders[0] == orders[2] != orders[1]


def test_checkpointing_under_both_of_its_names(make_experiment):
    both = {"gradient_checkpointing", "activation_checkpointing"}
    again = {"use_reentrant": False}
    for known, name in (
        ({"gradient_checkpointing"}, "gradient_checkpointing"),
        (both, "activation_checkpointing"),
    ):
        assert checkpointing_options(True, known) == {name: True, f"{name}_kwargs": again}
        assert checkpointing_options(False, known) == {name: False}
    for wanted in (True, False):  # and the installed transformers takes it
        arguments = training_arguments(make_experiment(training={"gradient_checkpointing": wanted}))
        names = [name for name in both if getattr(arguments, name, None) is not None]
        assert [getattr(arguments, name) for name in names] == [wanted] * len(names)
        assert names


def test_accelerates_one_process_on_cpus_is_said(make_experiment, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    training_arguments(make_experiment())
    assert "accelerate launch starts one process on CPUs" in caplog.text


def test_without_tensorboard_it_says_what_to_install(make_experiment, examples, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'rode\[train\]'"):
        train(make_experiment(), examples=examples)
