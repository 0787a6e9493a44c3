"""Tasks and clusters on their way from records to routers: training, evaluation, answers, the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rode.cli import main
from rode.training.clusters import FILE, Clusters, Embedder, fit_clusters
from rode.training.config import ConfigError
from rode.training.side_inputs import Routes
from rode.training.train import make_trainable, train
from rode.tuner import RodeConfig
from rode.tuner.presets import PRESETS, preset
from rode.vlm import load_adapter, load_vlm
from rode_food import TASKS, load_examples
from rode_food.source import Source

BY_TASK = {"ranks": [2, 4], "gate": "softmax", "router_input": "task", "num_ids": 4}


def test_tasks_are_numbered_in_their_order():
    routes = Routes(preset("polytropon"))
    ids = routes(["category", "ingredients", "nutrition"], ["?"] * 3)
    assert {name: t.tolist() for name, t in ids.items()} == {"rode_task_ids": [3, 0, 2]}
    assert Routes(preset("rode"))(["recipe"], ["?"]) == {}
    assert Routes(None)([None], ["?"]) == {}
    assert list(Routes(preset("loramoe"))(["recipe"], ["?"])) == ["rode_task_ids"]  # its loss reads them


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            preset("polytropon", num_ids=3),
            r"adapter.num_ids: expected 4, for the tasks ingredients, .*; got 3",
        ),
        (preset("loramoe", aux_groups=(0, 1)), "adapter.aux_groups: expected 4, .*; got 2"),
        (preset("mocle"), r"fit-clusters` in model.clusters"),
    ],
)
def test_routes_that_do_not_fit_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        Routes(config)


def test_groups_of_a_loss_need_no_task_at_inference():
    assert Routes(preset("loramoe"))([None], ["Is it spicy?"]) == {}


def test_clusters_with_groups_count_tasks_for_the_groups(tmp_path):
    clusters, embed = Clusters(torch.eye(16)), object()
    config = preset("mocle", aux_loss="importance", aux_groups=(0, 1, 0, 1))
    routes = Routes(config, clusters, embed)
    assert (routes.task_input, routes.cluster_input) == ("rode_task_ids", "rode_cluster_ids")


def test_a_question_without_a_task_is_refused():
    with pytest.raises(ValueError, match=r"reads the task of a question: say which of .*--task"):
        Routes(preset("moelora"))([None], ["Is it spicy?"])


def test_a_task_that_the_router_does_not_know_is_refused():
    with pytest.raises(
        ValueError, match=r"router knows the tasks ingredients, .*, and got 'question': leave it out"
    ):
        Routes(preset("polytropon"))(["category", "question"], ["?"] * 2)


def test_clusters_find_what_is_alike(tmp_path):
    table = torch.eye(6)

    class Words:
        def __call__(self, text, add_special_tokens):
            from types import SimpleNamespace

            return SimpleNamespace(input_ids=[int(word) for word in text.split()])

    embed = Embedder(Words(), table)
    torch.testing.assert_close(embed(["0 0 1"]), torch.tensor([[2.0, 1, 0, 0, 0, 0]]) / 5**0.5)
    texts = ["0 1", "1 0 0", "0 1 1", "4 5", "5 5 4", "4 5"]
    clusters, ids = fit_clusters(texts, embed, 2)
    assert len(set(ids[:3])) == len(set(ids[3:])) == 1
    assert ids[0] != ids[3]
    # each centre is the mean of its members, the repeated text counted twice
    vectors = embed(texts)
    torch.testing.assert_close(clusters.centres[ids[0]], vectors[:3].mean(0))
    torch.testing.assert_close(clusters.centres[ids[3]], vectors[3:].mean(0))
    assert clusters.ids(embed(["0", "5"])).tolist() == [ids[0], ids[3]]
    file = clusters.save(tmp_path / FILE)
    assert torch.equal(Clusters.load(tmp_path).centres, clusters.centres)
    assert Clusters.load(file).encoder is None
    with pytest.raises(ValueError, match="7 of them want as many different questions, and there are 5"):
        fit_clusters(texts, embed, 7)
    with pytest.raises(ValueError, match="embeddings of size 6, got 3; fit them again"):
        clusters.ids(torch.zeros(1, 3))
    with pytest.raises(FileNotFoundError, match="`rode fit-clusters` writes them"):
        Clusters.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": {"preset": "mocle"}}, "model.clusters: router_input 'cluster' wants the file"),
        (
            {"adapter": {"preset": "moelora"}, "training": {"questions_per_picture": 4}},
            "training.questions_per_picture: this adapter treats a sequence as one question",
        ),
        (
            {"adapter": {"preset": "loramoe"}, "training": {"questions_per_picture": 2}},
            "set it to 1, got 2",
        ),
        (
            {
                "adapter": {"method": "peft", "peft_type": "POLY", "n_tasks": 4},
                "training": {"questions_per_picture": 2},
            },
            "questions_per_picture",
        ),
        ({"adapter": {"preset": "mocl"}}, "adapter.preset: no 'mocl'; did you mean mocle"),
        ({"adapter": {"preset": "rode", "top_k": 2}}, "adapter: top_k: gate='relu' chooses no k experts"),
        (
            {"adapter": {"method": "lora"}},
            "adapter.method: expected one of rode, peft, moe-llava, got 'lora'",
        ),
        (
            {"adapter": {"method": "peft", "peft_type": "RODE"}},
            "adapter.peft_type: expected a method of PEFT",
        ),
        (
            {"adapter": {"method": "peft", "peft_type": "LORA", "rank": 8}},
            "adapter.rank: no such key; did you mean r",
        ),
        (
            {"adapter": {"method": "moe-llava", "experts": 8}},
            "adapter.experts: no such key; did you mean num_experts",
        ),
        (
            {"adapter": {"method": "moe-llava", "top_k": 9}},
            "adapter: top_k: expected at most num_experts=4, got 9",
        ),
    ],
)
def test_configs_that_cannot_be_are_refused(make_experiment, changes, words):
    with pytest.raises(ConfigError, match=words):
        make_experiment_with(make_experiment, dict(changes))


def make_experiment_with(make_experiment, changes):
    """make_experiment merges sections; an adapter is replaced whole."""
    from dataclasses import asdict

    from rode.training.config import experiment_from_dict

    adapter = changes.pop("adapter")
    values = asdict(make_experiment(**changes)) if "training" not in changes else asdict(make_experiment())
    values["training"].update(changes.get("training", {}))
    values["model"].update(changes.get("model", {}))
    values["adapter"] = adapter
    return experiment_from_dict(values)


def test_a_preset_is_its_fields(make_experiment):
    from rode.training.config import adapter_config

    experiment = make_experiment_with(make_experiment, {"adapter": {"preset": "hydralora", "alpha": 8.0}})
    config = adapter_config(experiment)
    assert isinstance(config, RodeConfig)
    assert (config.ranks, config.alpha, config.shared_A) == ((4,) * 4, 8.0, True)


def predictions(folder: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_task_router_from_training_to_answers(make_experiment, food, tmp_path, capsys):
    experiment = make_experiment_with(make_experiment, {"adapter": BY_TASK, "training": {"max_steps": 3}})
    result = train(experiment, progress=False)
    layer = next(m for m in result.model.modules() if hasattr(m, "rode_adapters"))
    assert (
        layer.adapter("default").table.detach().abs() > 1e-3
    ).any()  # all tasks were seen and moved their rows
    out = tmp_path / "evaluation"
    run, data = str(result.output_dir), str(food / "records.jsonl")
    assert (
        main(
            [
                "evaluate",
                "--adapter",
                run,
                "--data",
                data,
                "--out",
                str(out),
                "--quiet",
                "--max-new-tokens",
                "4",
            ]
        )
        == 0
    )
    assert len(predictions(out)) == 16
    image = str(food / "1.png")
    ask = ["generate", "--adapter", run, "--image", image, "--max-new-tokens", "4"]
    assert main([*ask, "--task", "category"]) == 0
    assert main([*ask, "--question", "Is it spicy?", "--as-task", "recipe"]) == 0
    capsys.readouterr()
    assert main([*ask, "--question", "Is it spicy?"]) == 1
    assert "reads the task of a question" in capsys.readouterr().err


def test_clusters_from_fitting_to_answers(make_experiment, food, tmp_path, monkeypatch, capsys):
    from rode.training.config import dump_experiment

    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_experiment(make_experiment()))
    assert main(["fit-clusters", "config.yaml", "--clusters", "3", "--out", "c/clusters.safetensors"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("questions, such as") == 3
    adapter = {"preset": "mocle", "ranks": [2, 2, 2], "num_ids": 3, "embedding_dim": 4}
    experiment = make_experiment_with(
        make_experiment,
        {"adapter": adapter, "model": {"clusters": "c/clusters.safetensors"}, "training": {"max_steps": 2}},
    )
    result = train(experiment, progress=False)
    assert (result.output_dir / FILE).is_file()
    image = str(food / "1.png")
    ask = ["generate", "--adapter", str(result.output_dir), "--image", image, "--max-new-tokens", "4"]
    assert main([*ask, "--question", "Anything at all?"]) == 0
    (result.output_dir / FILE).unlink()
    capsys.readouterr()
    assert main([*ask, "--question", "Anything at all?"]) == 1
    assert "fit-clusters" in capsys.readouterr().err
    wrong = make_experiment_with(
        make_experiment,
        {"adapter": {**adapter, "num_ids": 5}, "model": {"clusters": "c/clusters.safetensors"}},
    )
    wrong.output_dir = str(tmp_path / "other")
    with pytest.raises(ValueError, match=r"adapter\.num_ids: expected the 3 clusters of the file, got 5"):
        train(wrong, progress=False)


SMALL = {
    "lora": {},
    "llava-mole": {"ranks": [2, 2], "rank_pattern": {"(q_proj|k_proj|v_proj|o_proj)": [2]}},
    "mixlora": {"ranks": [2, 2, 2], "rank_pattern": {"(q_proj|k_proj|v_proj|o_proj)": [2]}},
    "mocle": {"ranks": [2, 2, 2], "num_ids": 2, "embedding_dim": 4},
    "remoe": {"aux_weight": 1e-4},
}


@pytest.fixture(scope="session")
def plates_folder(tmp_path_factory):
    from rode.demo import plates
    from rode.demo.parts import MissingPackage, check_packages

    try:
        check_packages(models=False)
    except MissingPackage as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("plates")
    plates.make_plates(folder, train=12, test=2, seed=0)
    return folder


def learns(make_experiment, adapter, records, tmp_path, **model):
    """Trains on plates; the loss falls, and the saved adapter gives the trained model's logits."""
    experiment = make_experiment_with(
        make_experiment,
        {
            "adapter": adapter,
            "model": model,
            "training": {"max_steps": 40, "learning_rate": 1e-2, "batch_size": 8, "gate_statistics": False},
        },
    )
    experiment.output_dir = str(tmp_path / "run")
    experiment.data.sources[0].path = str(records)
    result = train(experiment, progress=False)
    losses = [entry["loss"] for entry in result.history if "loss" in entry]
    # the averaged factors of Polytropon start slowly, here as in PEFT's Poly: 1 / r is a small scale
    slow = "polytropon" in adapter.values() or "POLY" in adapter.values()
    assert sum(losses[-5:]) < (0.95 if slow else 0.8) * sum(losses[:5]), losses
    plain, _ = load_vlm(experiment.model.path, dtype="float32", device="cpu")
    again = load_adapter(plain, result.output_dir)
    trained = dict(result.model.named_parameters())
    for name, p in again.named_parameters():
        assert torch.equal(p, trained[name]), name
    return result


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_learns_from_plates(name, make_experiment, plates_folder, tmp_path):
    records, model = plates_folder / "records.jsonl", {}
    if name == "mocle":
        questions = [e.question for e in load_examples([Source(str(records))], "train").examples]
        vlm, processor = load_vlm(make_experiment().model.path, dtype="float32", device="cpu")
        embed = Embedder(processor.tokenizer, vlm.get_input_embeddings().weight)
        model["clusters"] = str(fit_clusters(questions, embed, 2)[0].save(tmp_path / FILE))
    learns(make_experiment, {"preset": name, **SMALL.get(name, {})}, records, tmp_path, **model)


PEFT = {
    "poly": {"peft_type": "POLY", "r": 4, "n_tasks": len(TASKS), "n_skills": 3},
    "lora": {"peft_type": "LORA", "r": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PEFT, "moe-llava"])
def test_other_methods_learn_from_plates(name, make_experiment, plates_folder, tmp_path):
    adapter = {"method": "moe-llava"} if name == "moe-llava" else {"method": "peft", **PEFT[name]}
    learns(make_experiment, adapter, plates_folder / "records.jsonl", tmp_path)


@pytest.mark.slow
def test_x_lora_mixes_trained_adapters(make_experiment, plates_folder, tmp_path):
    """PEFT's X-LoRA over two LoRA adapters that PEFT trained; its classifier learns, they stay."""
    from rode.training.config import adapter_config

    records, adapters = plates_folder / "records.jsonl", {}
    for number in "ab":
        (tmp_path / number).mkdir()
        result = learns(make_experiment, {"method": "peft", **PEFT["lora"]}, records, tmp_path / number)
        adapters[number] = str(result.output_dir)
    hidden = result.model.config.text_config.hidden_size
    adapter = {"method": "peft", "peft_type": "XLORA", "hidden_size": hidden, "adapters": adapters}
    experiment = make_experiment_with(
        make_experiment, {"adapter": adapter, "training": {"max_steps": 5, "learning_rate": 1e-2}}
    )
    experiment.data.sources[0].path = str(records)
    assert type(adapter_config(experiment)).__name__ == "XLoraConfig"
    plain, _ = load_vlm(experiment.model.path, dtype="float32", device="cpu")
    start = {n: p.detach().clone() for n, p in make_trainable(plain, experiment).named_parameters()}
    result = train(experiment, progress=False)
    moved = {n for n, p in result.model.named_parameters() if not torch.equal(p, start[n])}
    assert moved
    assert all("xlora_classifier" in name for name in moved)
