"""Training from shards: what a file of records would teach, the same order for any number of workers and ranks, exact resuming."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rode.evaluation.evaluate import evaluate, evaluation_examples
from rode.training.train import train
from rode.training.usable import drop_unusable
from rode.vlm import FeatureSource, TrainingCollator, load_vlm
from rode_food import Source, load_examples, read_records
from rode_food.shards.examples import ShardExamples
from rode_food.shards.index import Shards, open_shards
from rode_food.shards.write import write_shards


@pytest.fixture(scope="module")
def shards_dir(food, tmp_path_factory):
    """The records of `food`, 12 to train on, in tars of 2."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    write_shards(read_records(food / "records.jsonl"), folder, name="food", size=2)
    return folder


@pytest.fixture
def experiment_of(make_experiment, shards_dir, tmp_path):
    def make(name="run", **changes):
        data = {"sources": [{"path": str(shards_dir), "shuffle_shards": 2}], "wording": "random"}
        return make_experiment(**{"data": data, "output_dir": str(tmp_path / name), **changes})

    return make


@pytest.fixture
def read(monkeypatch):
    """(record id, task) of what is collated in this process, in order."""
    items = []
    collate = TrainingCollator.__call__

    def noting(self, batch):
        items.extend((e.record_id, e.task) for e in batch)
        return collate(self, batch)

    monkeypatch.setattr(TrainingCollator, "__call__", noting)
    return items


def weights(directory):
    return load_file(next(f for f in directory.iterdir() if f.suffix == ".safetensors"))


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def planned(experiment, epochs):
    """(record id, task) in the order of the plan."""
    sources = [Source(**vars(source)) for source in experiment.data.sources]
    mixture = load_examples(sources, "train", wording="random", seed=experiment.training.seed)
    plan = [i for epoch in range(epochs) for i in mixture.plan(epoch)]
    return [(mixture.examples[i].record_id, mixture.examples[i].task) for i in plan]


def test_training_reads_the_plan(experiment_of, read):
    experiment = experiment_of(training={"max_steps": None, "epochs": 2, "batch_size": 6})
    result = train(experiment, progress=False)
    wanted = planned(experiment, 2)
    assert read == wanted
    assert len(wanted) == 96
    assert sorted(wanted[:48]) == sorted(wanted[48:])
    assert wanted[:48] != wanted[48:]
    assert result.metrics["examples"] == 48


def test_workers_change_nothing(experiment_of):
    runs = [
        train(experiment_of(str(n), training={"max_steps": 4, "workers": n}), progress=False) for n in (0, 2)
    ]
    assert_same(weights(runs[0].output_dir), weights(runs[1].output_dir))
    assert [h["loss"] for h in runs[0].history[:-1]] == [h["loss"] for h in runs[1].history[:-1]]


@pytest.mark.parametrize(("workers", "grouped"), [(0, False), (0, True), (2, False)])
def test_resuming_in_the_middle_of_an_epoch_is_exact_and_reads_nothing_again(
    experiment_of, read, monkeypatch, workers, grouped
):
    """Killed in the second epoch: the same bits as without, and only what was still to come is read."""
    training = {
        "max_steps": 20,
        "save_steps": 15,
        "batch_size": 4,
        "workers": workers,
        "group_by_length": grouped,
    }
    training["save_total_limit"] = 10
    common = {"training": training, "adapter": {"dropout": 0.5}}
    whole = train(experiment_of("whole", **common), progress=False)
    everything, first = list(read), 15 * 4
    read.clear()
    taken = []
    make = ShardExamples.__getitem__
    monkeypatch.setattr(ShardExamples, "__getitem__", lambda self, i: taken.append(i) or make(self, i))
    rest = train(experiment_of("rest", **common), resume=whole.output_dir / "checkpoint-15", progress=False)
    assert_same(weights(rest.output_dir), weights(whole.output_dir))
    assert not torch.equal(
        *(next(iter(weights(d).values())) for d in (whole.output_dir / "checkpoint-15", whole.output_dir))
    )
    if workers == 0:  # else it happens in other processes
        assert first > 48  # in the second epoch
        assert read == everything[first:]
        # before the first step every text is looked at, up to the end of the sequence
        assert taken[:49] == list(range(49))
        assert len(read) == len(taken) - 49 == 20 + 4  # one batch is read ahead


def test_packed_questions(experiment_of, make_experiment, food, tmp_path):
    """One epoch from shards, packed and not, and from the file of records: the same tokens, hence the same loss."""
    common = {"max_steps": None, "epochs": 1, "schedule": "constant", "warmup_steps": 0}
    losses = []
    for name, count, make in (("a", 1, experiment_of), ("b", 4, experiment_of), ("c", 4, make_experiment)):
        experiment = make(
            **({"name": name} if make is experiment_of else {}),
            adapter={"dropout": 0.0},
            training={**common, "questions_per_picture": count, "batch_size": 48 // count},
            output_dir=str(tmp_path / name),
        )
        experiment.data.wording = "first"
        result = train(experiment, progress=False)
        assert result.metrics["steps"] == 1
        losses.append(result.history[0]["loss"])
    assert losses == pytest.approx(losses[:1] * 3, rel=1e-5)


def test_shards_beside_records(experiment_of, shards_dir, food, read, tmp_path):
    (tmp_path / "more").mkdir()
    lines = (food / "records.jsonl").read_text().splitlines()[:3]
    (tmp_path / "more/bad.png").write_bytes(b"no")
    rows = [{**json.loads(line), "image": str(food / f"{i}.png")} for i, line in enumerate(lines)]
    rows[1]["image"] = "bad.png"
    (tmp_path / "more/records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        {"path": str(shards_dir), "tasks": ["category"], "weight": 0.5},
        {"path": str(tmp_path / "more/records.jsonl"), "tasks": ["category"], "name": "loose"},
    ]
    experiment = experiment_of(
        data={"sources": sources, "on_bad_record": "skip"},
        training={"max_steps": None, "epochs": 1, "batch_size": 2, "group_by_length": True},
    )
    result = train(experiment, progress=False)
    assert result.metrics["examples"] == 12 + 2
    assert result.metrics["skipped_records"] == 1
    assert len(read) == 6 + 2


def test_features_of_pictures_in_shards(food, shards_dir, llava_dir, tmp_path):
    """They are those of the loose file, found under the same digest."""
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    shards = open_shards(shards_dir)
    loose = {r.id: r.image for r in read_records(food / "records.jsonl")}
    source = FeatureSource(model, processor, tmp_path / "features")
    assert source.precompute(loose.values(), progress=False) == 16
    records = [shards.record(i) for i in range(16)]
    assert source.precompute([r.image for r in records], progress=False) == 0
    for record in records:
        assert torch.equal(source(record.image).states, source(loose[record.id]).states)


def test_evaluation_from_shards(food, shards_dir, llava_dir, tmp_path):
    model, processor = load_vlm(llava_dir, dtype="float32", device="cpu")
    scores = []
    for name, path in (("shards", shards_dir), ("file", food / "records.jsonl")):
        examples = evaluation_examples([Source(str(path))], "test")
        assert len(examples) == 16
        assert drop_unusable(examples)[1] == []
        scores.append(evaluate(model, processor, examples, tmp_path / name, max_new_tokens=4, progress=False))
    assert scores[0] == scores[1]
    rows = [json.loads(line) for line in (tmp_path / "shards/predictions.jsonl").read_text().splitlines()]
    assert all(row["image"].startswith(f"{shards_dir}/food-test-00000") for row in rows)


def test_a_shard_spoiled_during_training_names_itself(experiment_of, shards_dir, monkeypatch):
    images = Shards.images
    monkeypatch.setattr(Shards, "images", lambda self, i: [a.replace("+", "+9") for a in images(self, i)])
    with pytest.raises(OSError, match=r"record dish\d+: .*food-train-00000\d\.tar: cut short: expected 9\d+"):
        train(experiment_of(training={"max_steps": 1}), progress=False)


def test_the_sampler_is_told_its_epoch_through_any_wrapper(experiment_of, monkeypatch):
    """On several devices a resumed run wraps the sampler twice, where Trainer no longer finds it."""
    from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
    from torch.utils.data import BatchSampler

    from rode.training.trainer import AnswerTrainer

    experiment = experiment_of(training={"max_steps": 1})
    kept = []
    monkeypatch.setattr(AnswerTrainer, "train", lambda self, **_: kept.append(self) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(experiment, progress=False)
    (trainer,) = kept
    sampler = trainer._get_train_sampler()
    batches = SkipBatchSampler(BatchSamplerShard(BatchSampler(sampler, 4, False), 2, 1), skip_batches=2)
    trainer.state.epoch = 1 + 2 / 6
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert [i for batch in batches for i in batch] == [
        i for start in range(20, 48, 8) for i in trainer.plan(1)[start : start + 4]
    ]


RANKS = """
import json, os, sys
from rode.training.config import load_experiment
from rode.training.train import train
from rode.vlm import TrainingCollator

collate, log = TrainingCollator.__call__, open(f"{sys.argv[2]}/rank{os.environ['RANK']}", "w")

def noting(self, batch):
    for e in batch:
        print(e.record_id, e.task, file=log, flush=True)
    return collate(self, batch)

TrainingCollator.__call__ = noting
train(load_experiment(sys.argv[1]), resume=sys.argv[3] if len(sys.argv) > 3 else False, progress=False)
"""


@pytest.mark.slow
def test_two_ranks_share_the_order_and_resume_within_the_second_epoch(experiment_of, tmp_path):
    from rode.training.config import dump_experiment

    def run(name, *resume):
        training = {"max_steps": 10, "save_steps": 8, "batch_size": 4, "devices": 2, "save_total_limit": 9}
        experiment = experiment_of(name, training=training, adapter={"dropout": 0.0})
        (tmp_path / "ranks.py").write_text(RANKS)
        (tmp_path / f"{name}.yaml").write_text(dump_experiment(experiment))
        logs = tmp_path / f"{name}-logs"
        logs.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += [str(tmp_path / "ranks.py"), str(tmp_path / f"{name}.yaml"), str(logs), *map(str, resume)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        ranks = [
            [tuple(line.rsplit(" ", 1)) for line in (logs / f"rank{r}").read_text().splitlines()]
            for r in (0, 1)
        ]
        return experiment, ranks

    experiment, ranks = run("whole")
    order = planned(experiment, 2)[: (10 + 1) * 8]  # one batch is read ahead
    for rank in (0, 1):
        assert ranks[rank] == [item for i in range(rank * 4, len(order), 8) for item in order[i : i + 4]]
    _, rest = run("rest", Path(experiment.run_dir) / "checkpoint-8")
    assert rest == [rank[8 * 4 :] for rank in ranks]
    assert_same(weights(tmp_path / "rest"), weights(tmp_path / "whole"))
