"""Configs of the paper's open questions: what changes between them, and that nothing else does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from rode.paper.tables import own_table
from rode.training.config import ALL_TASKS, ConfigError, adapter_config, load_experiment
from rode_food import TASKS

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted((CONFIGS / "questions").glob("*.yaml"))
RANKS = ([2, 4, 8, 16], [7, 7, 8, 8], [1, 1, 4, 24], [15, 15], [30])


def joined(ranks):
    return "-".join(map(str, ranks))


def questions():
    """Variant -> its config."""
    found = {}
    for file in FILES:
        tables = own_table(file)
        (item,) = tables.items.values()
        for variant in item.variants:
            assert variant not in found
            found[variant] = tables.load(variant, [], tables.base(item))
    return found


@pytest.fixture(scope="module")
def experiments():
    return questions()


def test_there_is_one_for_each_case(experiments):
    want = {"top1-2-4-8-16", "data-1-8", "data-1-4", "data-1-2", "data-1"}
    want |= {f"ranks-{joined(ranks)}{task}" for ranks in RANKS for task in ("", *(f"-{t}" for t in TASKS))}
    assert set(experiments) == want


def test_each_is_the_papers_run_but_for_what_is_asked(experiments):
    full = load_experiment(CONFIGS / "unifood-rode-7b.yaml")
    usual = adapter_config(full).to_dict()
    for name, experiment in experiments.items():
        (source,) = experiment.data.sources
        same = replace(
            full.data.sources[0],
            tasks=source.tasks if name.startswith("ranks-") else list(ALL_TASKS),
            fraction=source.fraction if name.startswith("data-") else 1.0,
        )
        assert source == same, name
        assert replace(experiment, name=full.name, adapter=full.adapter, data=full.data) == full, name
        found = adapter_config(experiment).to_dict()
        changed = {key for key, value in found.items() if value != usual[key]}
        allowed = {"ranks": {"ranks"}, "top1": {"gate", "top_k"}, "data": set()}
        assert changed <= allowed[name.partition("-")[0]], name


@pytest.mark.parametrize("ranks", RANKS, ids=joined)
def test_rank_sets_have_one_total(experiments, ranks):
    assert sum(ranks) == 30
    for task in ("", *TASKS):
        found = experiments[f"ranks-{joined(ranks)}" + (f"-{task}" if task else "")]
        assert found.adapter == {"gate": "relu", "ranks": ranks}
        assert found.data.sources[0].tasks == ([task] if task else list(TASKS))


def test_fractions_of_the_data(experiments):
    for name, fraction in (("data-1-8", 0.125), ("data-1-4", 0.25), ("data-1-2", 0.5), ("data-1", 1)):
        assert experiments[name].data.sources[0].fraction == fraction
        assert experiments[name].adapter == {"ranks": [2, 4, 8, 16], "gate": "relu"}


def test_the_other_router():
    experiment = load_experiment(CONFIGS / "questions" / "top1-2-4-8-16.yaml")
    assert experiment.adapter == {"ranks": [2, 4, 8, 16], "gate": "topk", "top_k": 1}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_sweep_makes_a_table(capsys, processes, reproduce, tmp_path):
    file = str(CONFIGS / "questions" / "data.yaml")
    assert reproduce(file, "--only", "data-1-2", "data-1", "--seeds", "0", "1") == 0
    out = capsys.readouterr().out
    assert "== data-1 seed 1 (4 of 4): new" in out
    runs = ["data-1-2-seed0", "data-1-seed0", "data-1-2-seed1", "data-1-seed1"]
    assert processes.steps() == [(step, run, False) for run in runs for step in ("train", "evaluate")]
    experiment = load_experiment(tmp_path / "runs" / "small" / "data-1-2-seed0" / "config.yaml")
    assert [source.fraction for source in experiment.data.sources] == [0.5]
    assert experiment.model.path == "models/small"

    assert "\nVariants of data; ours: small\n" in out
    rows = {cells(line)[0]: cells(line)[1:] for line in out.splitlines() if line.startswith("|")}
    assert rows[""] == ["data-1-8", "data-1-4", "data-1-2", "data-1"]  # and no column of the paper's
    # seeds 0 and 1 measure 0 and 1: deviation the root of (1/4 + 1/4) / 1
    assert rows["SacreBLEU"] == ["", "", "0.50 ± 0.71", "0.50 ± 0.71"]
    assert rows["category"] == [""] * 4
    assert rows["trainable parameters"] == ["", "", "30,000", "30,000"]
    assert "was not run as" not in out  # variants are meant to differ in their data
    assert (tmp_path / "results" / "small" / "data.md").is_file()

    assert reproduce(file, "--only", "data-1-4", "training.max_steps=9") == 0
    assert "- data-1-2 seed 0 was not run as data-1-4 seed 0 was: training.max_steps: 6 (was 9)" in (
        capsys.readouterr().out
    )
    assert reproduce(file, "--no-run") == 0


def test_one_config_makes_a_table_of_one_row(capsys, processes, reproduce):
    assert reproduce(str(CONFIGS / "questions" / "top1-2-4-8-16.yaml"), "--seeds", "2") == 0
    out = capsys.readouterr().out
    assert "== top1-2-4-8-16 seed 2 (1 of 1): new" in out
    assert "Variants of top1-2-4-8-16; ours: small" in out


def test_what_makes_no_table(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.yaml: no such config"):
        own_table(tmp_path / "none.yaml")
    (tmp_path / "a.yaml").write_text("name: a\n")
    with pytest.raises(ConfigError, match=r"a.yaml: extends: missing; results are kept by the name"):
        own_table(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nsweep: 3\n")
    with pytest.raises(ConfigError, match=r"b.yaml: sweep: expected a mapping"):
        own_table(tmp_path / "b.yaml")
