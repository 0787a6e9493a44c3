"""Configs: what is refused and how it is said; the paper's run, number for number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    get_scheduler,
)

from rode.training.arguments import training_arguments
from rode.training.base_weights import rates_of
from rode.training.config import (
    ConfigError,
    adapter_config,
    dump_experiment,
    experiment_from_dict,
    experiment_values,
    load_experiment,
    saved_config,
)
from rode.training.trainer import parameter_groups
from rode.tuner import RodeLayer

CONFIGS = Path(__file__).parents[3] / "configs"
MINIMAL = {"name": "a", "model": {"path": "m"}, "data": {"sources": [{"path": "r.jsonl"}]}}


def write(folder, changes="", base=MINIMAL):
    """A config of `base` with the keys of `changes` in place of its own; or of `changes` as they stand, if they are no mapping."""
    file = folder / "r.yaml"
    try:
        text = yaml.safe_dump({**base, **yaml.safe_load(changes or "{}")})
    except (yaml.YAMLError, TypeError):
        text = yaml.safe_dump(base) + changes
    file.write_text(text)
    return file


BAD = [
    ("training: {learning_rte: 1}", r"training.learning_rte: no such key; did you mean learning_rate"),
    ("adaptr: {}", r"adaptr: no such key; did you mean adapter"),
    ("adapter: {rank: [2]}", r"adapter.rank: no such key; did you mean ranks"),
    ("adapter: {ranks: [2, 0]}", r"adapter: ranks: expected positive whole numbers, got 0"),
    ("adapter: {gate: relo}", r"adapter: gate: expected one of .*got 'relo'"),
    ("training: {learning_rate: fast}", r"training.learning_rate: expected a number, got 'fast'"),
    ("training: {batch_size: 4.5}", r"training.batch_size: expected a whole number, got 4.5"),
    ("training: {batch_size: true}", r"training.batch_size: expected a whole number, got True"),
    ("training: {batch_size: 0}", r"training.batch_size: expected more than 0, got 0"),
    ("training: {betas: 0.9}", r"training.betas: expected a list of a number, got 0.9"),
    ("training: {betas: [0.9]}", r"training.betas: expected two numbers"),
    ("training: {max_steps: 0}", r"training.max_steps: expected more than 0, got 0"),
    ("training: 3", r"training: expected a mapping, got 3"),
    ("stage: both", r"stage: expected one of adapter, projector, got 'both'"),
    ("stage: projector\nadapter: {ranks: [2]}", r"adapter: stage 'projector' trains no adapter"),
    ("evaluation: {split: dev}", r"evaluation.split: expected one of train, val, test, got 'dev'"),
    ("model: {dtype: bfloat16}", r"model.path: missing; expected text"),
    ("data: {sources: []}", r"data.sources: expected at least one source"),
    (
        "data: {sources: [{path: a, weight: -1}]}",
        r"data.sources\[0\]: weight of a: expected a finite number >= 0",
    ),
    ("data: {sources: [{path: a, fraction: 2}]}", r"data.sources\[0\]: fraction of a: expected more than 0"),
    (
        "data: {sources: [{path: a, tasks: [cook]}]}",
        r"data.sources\[0\].tasks\[0\]: expected one of .*got 'cook'",
    ),
    ("data: {sources: [{path: a, split_fractions: {train: 2}}]}", r"data.sources\[0\]: split fractions"),
    ("- [", r"not YAML"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_experiment(write(tmp_path, changes))
    assert str(error.value).startswith(str(tmp_path / "r.yaml"))
    assert "\n" not in str(error.value)


def test_overrides(tmp_path):
    file = write(tmp_path)
    experiment = load_experiment(
        file,
        [
            "training.learning_rate=1e-2",
            "data.sources.0.tasks=[recipe]",
            "adapter.ranks=[3, 5]",
            "output_dir=x",
            "model.projector=null",
        ],
    )
    assert experiment.training.learning_rate == 0.01  # YAML 1.1 reads 1e-2 as text
    assert experiment.data.sources[0].tasks == ["recipe"]
    assert adapter_config(experiment).ranks == (3, 5)
    assert experiment.run_dir == Path("x")
    assert load_experiment(file).run_dir == Path("runs/a")
    for override, message in [
        ("training.sed=1", "did you mean seed"),
        ("training.seed", "expected key.sub=value"),
        ("data.sources.1.path=x", "no index into a list of 1"),
        ("name.x=1", "which is no mapping"),
        ("training.seed=[", "is not YAML"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_experiment(file, [override])
    with pytest.raises(FileNotFoundError, match="no such config"):
        load_experiment(tmp_path / "none.yaml")


def written(folder, **files):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)


def test_what_is_extended_lies_below(tmp_path):
    (tmp_path / "sub").mkdir()
    written(
        tmp_path,
        a="name: a\nmodel: {path: m, dtype: float32}\ndata: {sources: [{path: x}, {path: y}]}\n"
        "adapter: {ranks: [8], alpha: 3}\ntraining: {betas: [0.5, 0.6], batch_size: 2, seed: 7}\n",
        b="extends: a.yaml\nname: b\ntraining: {batch_size: 3, betas: [0.1, 0.2]}\n",
        other="name: other\nmodel: {path: n}\ndata: {sources: [{path: z}]}\ntraining: {seed: 9}\n",
    )
    file = tmp_path / "sub" / "c.yaml"
    file.write_text(
        "extends: ../b.yaml\nadapter: {ranks: [2, 4]}\ndata: {sources: [{path: z}]}\ntraining: {seed: 8}\n"
    )
    experiment = load_experiment(file, ["training.batch_size=5"])
    assert experiment.name == "b"
    assert (experiment.model.path, experiment.model.dtype) == ("m", "float32")
    assert [source.path for source in experiment.data.sources] == ["z"]  # a list is replaced
    assert experiment.adapter == {"ranks": [2, 4]}  # so is the adapter: alpha stays behind
    assert (experiment.training.seed, experiment.training.batch_size, experiment.training.betas) == (
        8,
        5,
        [0.1, 0.2],
    )
    assert "extends" not in dump_experiment(experiment)
    assert load_experiment(tmp_path / "a.yaml").training.seed == 7  # what is below is not changed

    on_other = load_experiment(file, base=tmp_path / "other.yaml")
    assert (on_other.name, on_other.model.path, on_other.adapter) == ("other", "n", {"ranks": [2, 4]})
    assert (on_other.training.seed, on_other.training.batch_size) == (8, 4)
    assert load_experiment(tmp_path / "other.yaml", base=tmp_path / "b.yaml").training.betas == [0.1, 0.2]


def test_what_cannot_be_extended(tmp_path):
    written(
        tmp_path, a="extends: b.yaml\n", b="extends: a.yaml\n", c="extends: [a.yaml]\n", d="extends: e.yaml\n"
    )
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    with pytest.raises(ConfigError, match=f"{a}: extends: expected an end, got {a} -> {b} -> {a}"):
        load_experiment(a)
    with pytest.raises(
        ConfigError, match=r"c.yaml: extends: expected the name of a config file, got \['a.yaml'\]"
    ):
        load_experiment(tmp_path / "c.yaml")
    with pytest.raises(
        FileNotFoundError, match=f"e.yaml: no such config, which {tmp_path / 'd.yaml'} extends"
    ):
        load_experiment(tmp_path / "d.yaml")
    with pytest.raises(ConfigError, match="extends: expected an end"):
        load_experiment(tmp_path / "d.yaml", base=tmp_path / "d.yaml")


@pytest.mark.parametrize("file", sorted((CONFIGS / "paper").glob("*-*.yaml")), ids=lambda file: file.stem)
def test_a_variant_is_the_shared_run_but_for_its_adapter(file):
    values, shared = experiment_values(file), experiment_values(CONFIGS / "unifood-7b.yaml")
    assert values["name"] == file.stem
    assert {**values, "name": "", "adapter": {}} == {**shared, "name": "", "adapter": {}}
    load_experiment(file)


def test_paths_are_expanded(monkeypatch):
    monkeypatch.setenv("MODELS", "/big")
    assert experiment_from_dict({**MINIMAL, "model": {"path": "$MODELS/llava"}}).model.path == "/big/llava"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_config_loads_and_comes_back(file, tmp_path):
    experiment = load_experiment(file)
    assert experiment.name == file.stem
    (tmp_path / "again.yaml").write_text(dump_experiment(experiment))
    assert load_experiment(tmp_path / "again.yaml") == experiment


@pytest.fixture(scope="module")
def llava_7b():
    """llava-1.5-7b's layout without its weights."""
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    with torch.device("meta"):
        return lambda: LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def adapted(experiment, model):
    with torch.device("meta"):
        return get_peft_model(model, adapter_config(experiment))


def test_the_papers_run(llava_7b, tmp_path, caplog):
    experiment = load_experiment(
        CONFIGS / "unifood-rode-7b.yaml", [f"output_dir={tmp_path}", "model.device=cpu"]
    )
    with torch.device("meta"):
        model = adapted(experiment, llava_7b())
    layers = {name: m for name, m in model.named_modules() if isinstance(m, RodeLayer)}
    names = {
        f"base_model.model.model.language_model.layers.{i}.self_attn.{p}_proj"
        for i in range(32)
        for p in "qv"
    }
    assert set(layers) == names
    for layer in layers.values():
        assert layer.adapter("default").ranks == (2, 4, 8, 16)
        assert layer.adapter("default").scaling == (8.0, 4.0, 2.0, 1.0)  # alpha 16 / rank
        assert layer.adapter("default").config.dropout == 0.05
        assert layer.adapter("default").config.gate == "relu"
    # each of 64 layers: A 30 x 4096, B 4096 x 30, router 4 x 4096, no bias
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 64 * (30 * 4096 + 4096 * 30 + 4 * 4096) == 16_777_216
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)

    arguments = training_arguments(experiment, progress=False)
    expected = {
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "warmup_steps": 100,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 10,
        "num_train_epochs": 1,
        "max_steps": -1,
        "optim": "adamw_torch",
        "lr_scheduler_type": "linear",
    }
    assert {name: getattr(arguments, name) for name in expected} == expected
    assert experiment.training.devices * 4 * 10 == 160
    assert (experiment.model.dtype, experiment.model.prompt, experiment.stage) == (
        "bfloat16",
        "vicuna",
        "adapter",
    )
    assert experiment.training.projector_learning_rate is None
    # one device here: the config says that it means four
    assert "a global batch of 160; on 1 it is 40" in caplog.text

    groups = parameter_groups(model, rates_of(experiment), arguments.weight_decay)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(3e-4, 0.0, 64 * 3)]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = get_scheduler(arguments.lr_scheduler_type, optimizer, arguments.warmup_steps, 2500)
    rates = []
    for _ in range(2500):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    # WarmupDecayLR, linear: up over 100 steps, then down to 0 at the last
    assert rates[0] == 0.0
    assert rates[50] == pytest.approx(1.5e-4)
    assert rates[100] == pytest.approx(3e-4)
    assert rates[1300] == pytest.approx(1.5e-4)
    assert schedule.get_last_lr()[0] == 0.0


def test_foodlmm_is_one_lora_of_rank_8_and_nothing_else_differs(llava_7b):
    experiment = load_experiment(CONFIGS / "unifood-foodlmm-7b.yaml")
    with torch.device("meta"):
        model = adapted(experiment, llava_7b())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 64 * (8 * 4096 * 2)
    other = load_experiment(CONFIGS / "unifood-rode-7b.yaml")
    assert (experiment.training, experiment.data, experiment.model, experiment.evaluation) == (
        other.training,
        other.data,
        other.model,
        other.evaluation,
    )
    assert {k: v for k, v in experiment.adapter.items() if k not in ("ranks", "gate")} == {
        k: v for k, v in other.adapter.items() if k not in ("ranks", "gate")
    }


def test_an_older_runs_recipe_yaml_is_still_found(tmp_path):
    assert saved_config(tmp_path) is None
    (tmp_path / "recipe.yaml").write_text("name: a")
    assert saved_config(tmp_path) == tmp_path / "recipe.yaml"
    (tmp_path / "config.yaml").write_text("name: a")
    assert saved_config(tmp_path) == tmp_path / "config.yaml"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.learning_rate=.inf", "training.learning_rate"),
        ("training.learning_rate=1e999", "training.learning_rate"),
        ("training.weight_decay=.nan", "training.weight_decay"),
        ("training.betas=[0.9, nan]", r"training.betas\[1\]"),
        ("data.sources.0.weight=-.inf", r"data.sources\[0\].weight"),
        ("adapter.alpha=.nan", "adapter.alpha"),
        ("adapter.alpha_pattern={a: .inf}", "adapter.alpha_pattern.a"),
        ("training.deepspeed={zero_optimization: {stage: 2}, x: .inf}", "training.deepspeed.x"),
    ],
)
def test_settings_that_are_not_finite_are_refused(tmp_path, override, key):
    with pytest.raises(ConfigError, match=f"{key}: expected a finite number, got "):
        load_experiment(write(tmp_path), [override])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluation.batch_size=-1", "evaluation.batch_size: expected more than 0, got -1"),
        ("evaluation.max_new_tokens=0", "evaluation.max_new_tokens: expected more than 0, got 0"),
        ("evaluation.limit=0", "evaluation.limit: expected more than 0, got 0"),
        ("training.projector_learning_rate=-1", "training.projector_learning_rate: expected more than 0"),
        ("training.weight_decay=-0.1", "training.weight_decay: expected at least 0, got -0.1"),
        ("training.betas=[0.9, 1]", r"training.betas\[1\]: expected at least 0 and less than 1, got 1.0"),
        ("training.workers=-1", "training.workers: expected at least 0, got -1"),
        ("training.seed=-1", "training.seed: expected at least 0, got -1"),
    ],
)
def test_nonsense_is_refused_when_the_config_is_read(tmp_path, override, words):
    with pytest.raises(ConfigError, match=words):
        load_experiment(write(tmp_path), [override])
