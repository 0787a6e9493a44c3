"""Every family from a config to an answer: trained, resumed, loaded, asked, scored, analysed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from rode.cli import main
from rode.evaluation.generate import answer
from rode.training.config import dump_experiment
from rode.training.train import train
from rode.vlm import load_adapter, load_vlm
from rode.vlm.load import projector_name
from tiny_vlms import TINY_VLMS, save_tiny_vlm

# A few at every change, the rest among the long tests
QUICK = ("llava", "qwen2.5-vl", "gemma3")


def some(quick, *others):
    """Names of families: one at every change, the others among the long tests."""
    return [quick, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


FAMILIES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in TINY_VLMS]


@pytest.fixture
def experiment_of(make_experiment, tmp_path):
    def make(name, **changes):
        folder = save_tiny_vlm(name, tmp_path / name)
        model = {"path": str(folder), "prompt": "auto", **changes.pop("model", {})}
        training = {
            "learning_rate": 2e-2,
            "batch_size": 2,
            "max_steps": 12,
            "save_steps": 6,
            "schedule": "constant",
        }
        return make_experiment(
            model=model,
            adapter={"ranks": [4, 8], "dropout": 0.0},
            training={**training, **changes.pop("training", {})},
            **changes,
        )

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_from_a_config_to_an_answer(name, experiment_of, food, tmp_path, capsys):
    experiment = experiment_of(name, training={"projector_learning_rate": 1e-3, "group_by_length": True})
    result = train(experiment, progress=False)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.3
    entry = result.history[0]
    assert 0 < entry["gates/open_image"] < 1  # tokens of pictures and of text are told apart
    assert 0 < entry["gates/open_text"] < 1

    saved = load_file(result.output_dir / "adapter_model.safetensors")
    last = projector_name(result.model).rpartition(".")[2]
    assert {"rode_adapters", last} <= {part for key in saved for part in key.split(".")}
    assert not any(f"vision_tower.{key}" in key for key in saved)

    # resumed from the middle to the same bits
    rest = tmp_path / "rest"
    shutil.copytree(result.output_dir / "checkpoint-6", rest / "checkpoint-6")
    experiment.output_dir = str(rest)
    train(experiment, resume=True, progress=False)
    again = load_file(rest / "adapter_model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in saved.items())

    # loaded to the same logits, and asked from the command line
    model, _ = load_vlm(experiment.model.path, dtype="float32", device="cpu")
    loaded = load_adapter(model, result.output_dir)
    ours = result.model.state_dict()
    for key, value in loaded.state_dict().items():
        if "rode_adapters" in key or "modules_to_save" in key:
            assert torch.equal(value, ours[key]), key
    capsys.readouterr()
    command = ["generate", "--adapter", str(result.output_dir), "--task", "category", "--max-new-tokens", "4"]
    assert main([*command, "--image", str(food / "0.png"), str(food / "1.png"), "--json", "--quiet"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(food / "0.png"), str(food / "1.png")]


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_and_analysis(name, experiment_of, food, tmp_path):
    """An adapter of one step is scored, and its router analysed."""
    experiment = experiment_of(name, training={"max_steps": 1}, evaluation={"max_new_tokens": 3})
    train(experiment, progress=False)
    file = tmp_path / "run.yaml"
    file.write_text(dump_experiment(experiment))
    assert main(["evaluate", str(file), "--limit", "4", "--quiet"]) == 0
    folder = experiment.run_dir / "evaluation"
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 4
    kinds = {
        kind
        for layer in json.loads((folder / "gates.json").read_text())["layers"]
        for kind in layer["tokens"]
    }
    assert kinds == {"image", "text", "all"}
    if name not in (
        "llava",
        "qwen3-vl",
        "idefics3",
        "gemma3",
    ):  # drawing takes seconds, and reads nothing of the family
        return
    out = tmp_path / "analysis"
    assert main(["analyze", str(experiment.run_dir), "--limit", "4", "--out", str(out), "--quiet"]) == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_projector_alone(name, experiment_of):
    """Stage 1 trains and writes what lies between tower and language model, and nothing else."""
    experiment = experiment_of(name, stage="projector", training={"max_steps": 2})
    before, _ = load_vlm(experiment.model.path, dtype="float32", device="cpu")
    result = train(experiment, progress=False)
    projector = projector_name(before)
    changed = {
        key
        for key, value in result.model.state_dict().items()
        if not torch.equal(value, before.state_dict()[key])
    }
    assert changed
    assert all(key.startswith(f"{projector}.") for key in changed)
    after, _ = load_vlm(experiment.model.path, dtype="float32", device="cpu", projector=result.output_dir)
    for key in changed:
        assert torch.equal(after.state_dict()[key], result.model.state_dict()[key]), key


def test_what_a_family_cannot_do_is_said_before_it_trains(experiment_of):
    with pytest.raises(
        ValueError, match="questions_per_picture: expected 1 for 'qwen2_5_vl', got 2: its tokens have"
    ):
        train(experiment_of("qwen2.5-vl", training={"questions_per_picture": 2}), progress=False)
    with pytest.raises(
        ValueError, match="vision_features: expected live for 'gemma3' with a trained projector"
    ):
        train(
            experiment_of(
                "gemma3", model={"vision_features": "memory"}, training={"projector_learning_rate": 1e-3}
            ),
            progress=False,
        )


@pytest.mark.parametrize("name", some("qwen3-vl", "smolvlm"))
def test_stored_features_train_as_pictures_do(name, experiment_of, tmp_path):
    runs = []
    for features in ("live", "memory"):
        experiment = experiment_of(name, model={"vision_features": features}, training={"max_steps": 4})
        experiment.output_dir = str(tmp_path / features)
        runs.append([entry["loss"] for entry in train(experiment, progress=False).history if "loss" in entry])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


@pytest.mark.parametrize("router", ["task", "cluster"])
@pytest.mark.parametrize(
    "name",
    [
        "gemma3",
        pytest.param("smolvlm", marks=pytest.mark.slow),
        pytest.param("qwen2.5-vl", marks=pytest.mark.slow),
    ],
)
def test_routers_that_read_the_task_or_the_cluster(name, router, experiment_of, tmp_path):
    experiment = experiment_of(name, training={"max_steps": 2}, evaluation={"max_new_tokens": 2})
    experiment.adapter = {"ranks": [2, 4], "router_input": router, "num_ids": 4 if router == "task" else 2}
    file = tmp_path / "run.yaml"
    if router == "cluster":
        clusters = str(tmp_path / "clusters.safetensors")
        file.write_text(dump_experiment(experiment_of(name)))
        assert (
            main(
                [
                    "fit-clusters",
                    str(file),
                    "data.wording=all",
                    "--clusters",
                    "2",
                    "--out",
                    clusters,
                    "--quiet",
                ]
            )
            == 0
        )
        experiment.model.clusters = clusters
    file.write_text(dump_experiment(experiment))
    tasks = "[ingredients, recipe, nutrition, category]"
    assert main(["train", str(file), f"data.sources.0.tasks={tasks}", "--quiet"]) == 0
    assert main(["evaluate", str(file), f"data.sources.0.tasks={tasks}", "--limit", "4", "--quiet"]) == 0
    assert len((experiment.run_dir / "evaluation" / "predictions.jsonl").read_text().splitlines()) == 4


@pytest.mark.parametrize("name", TINY_VLMS)
def test_an_answer_does_not_depend_on_its_neighbours(name, food, tmp_path):
    """Three questions of unequal length about pictures, several of them, and none, answered in one batch and alone."""
    model, processor = load_vlm(save_tiny_vlm(name, tmp_path), dtype="float32", device="cpu")
    paths = [str(food / f"{i}.png") for i in range(3)]
    images = [paths[:1], paths[1:], paths[2:] if name == "paligemma" else []]
    questions = ["What is it?", "How much of everything is there on both plates?", "Why?"]
    together = answer(model, processor, images, questions, max_new_tokens=5, batch_size=3)
    alone = [
        answer(model, processor, [pictures], [question], max_new_tokens=5)[0]
        for pictures, question in zip(images, questions, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-vl",
        pytest.param("llava", marks=pytest.mark.slow),
        pytest.param("idefics3", marks=pytest.mark.slow),
        pytest.param("internvl", marks=pytest.mark.slow),
    ],
)
def test_records_with_several_pictures_or_none(name, experiment_of, food, tmp_path):
    rows = []
    for i in range(6):
        pictures = [str(food / f"{k}.png") for k in range(i, i + i % 3)]
        turns = [{"question": f"How many pictures are there, if {i} is no answer?", "answer": str(i % 3)}]
        row = {
            "id": f"r{i}",
            "image": pictures or None,
            "conversation": turns,
            "source": "s",
            "split": "train" if i < 3 else "test",
        }
        rows.append(json.dumps(row) + "\n")
    records = tmp_path / "records.jsonl"
    records.write_text("".join(rows))
    experiment = experiment_of(name, data={"sources": [{"path": str(records)}]}, training={"max_steps": 3})
    assert train(experiment, progress=False).metrics["examples"] == 3
    file = tmp_path / "run.yaml"
    file.write_text(dump_experiment(experiment))
    assert main(["evaluate", str(file), "--max-new-tokens", "2", "--quiet"]) == 0
    metrics = json.loads((experiment.run_dir / "evaluation" / "metrics.json").read_text())
    assert "question_exact" in metrics["all"]
