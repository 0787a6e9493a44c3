"""Sweeps: which variants a file holds, how one is chosen, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from rode.training.config import ALL_TASKS, ConfigError, experiment_values, load_experiment
from rode.training.sweep import variants

BASE = {
    "name": "base",
    "model": {"path": "m"},
    "data": {"sources": [{"path": "r.jsonl", "name": "r"}, {"path": "s.jsonl"}]},
    "training": {"batch_size": 3},
}
SWEEP = """\
extends: base.yaml
name: ranks
adapter: {gate: softmax}
sweep:
  adapter.ranks: {2-4: [2, 4], 30: [30]}
  data.sources.0.tasks: {"": [recipe, nutrition], recipe: [recipe]}
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "ranks.yaml").write_text(SWEEP)
    return tmp_path / "ranks.yaml"


def test_variants_are_the_combinations_in_order(file):
    assert variants(experiment_values(file)) == {
        "ranks-2-4": {"adapter.ranks": [2, 4], "data.sources.0.tasks": ["recipe", "nutrition"]},
        "ranks-2-4-recipe": {"adapter.ranks": [2, 4], "data.sources.0.tasks": ["recipe"]},
        "ranks-30": {"adapter.ranks": [30], "data.sources.0.tasks": ["recipe", "nutrition"]},
        "ranks-30-recipe": {"adapter.ranks": [30], "data.sources.0.tasks": ["recipe"]},
    }
    assert variants(BASE) == {}


def test_one_variant_is_one_config(file):
    experiment = load_experiment(file, ["training.seed=4", "sweep=ranks-30-recipe", "adapter.alpha=8"])
    assert experiment.name == "ranks-30-recipe"
    assert experiment.adapter == {"gate": "softmax", "ranks": [30], "alpha": 8}
    first, second = experiment.data.sources
    assert (first.path, first.name, first.tasks) == ("r.jsonl", "r", ["recipe"])  # the rest of a source stays
    assert (second.path, second.tasks) == ("s.jsonl", list(ALL_TASKS))
    assert (experiment.training.batch_size, experiment.training.seed) == (3, 4)
    twice = load_experiment(
        file, ["sweep=ranks-30-recipe", "sweep=ranks-2-4"]
    )  # the last one, as for every key
    assert twice.name == "ranks-2-4"


def test_a_sweep_stays_over_another_base(file, tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump({**BASE, "name": "other", "adapter": {"alpha": 2}}))
    experiment = load_experiment(file, ["sweep=ranks-2-4"], base=tmp_path / "other.yaml")
    assert experiment.adapter == {"gate": "softmax", "ranks": [2, 4]}  # adapters are taken as a whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            [],
            "sweep: expected sweep=NAME to choose one of its variants, got none: ranks-2-4, ranks-2-4-recipe, ",
        ),
        (["sweep=ranks-31"], r"sweep=ranks-31: no such variant; did you mean ranks-30"),
    ],
)
def test_a_variant_must_be_chosen(file, overrides, message):
    with pytest.raises(ConfigError, match=message) as error:
        load_experiment(file, overrides)
    assert str(error.value).startswith(f"{file}: ")
    with pytest.raises(ConfigError, match="sweep=a: no such variant; the config has no sweep; leave it out"):
        load_experiment(file.with_name("base.yaml"), ["sweep=a"])


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("[1, 2]", r"sweep: expected a mapping of keys to labelled values, got \[1, 2\]"),
        ("{training.seed: [1, 2]}", r"sweep.training.seed: expected a mapping of labels to values, got \[1, 2\]"),
        ("{training.seed: {}}", "sweep.training.seed: expected a mapping of labels to values, got {}"),
        ("{training.seed: {1: 1, '1': 2}}", "labels than those of 'base-1': two variants have this name"),
        ("{training.seed: {a/b: 1}}", "labels than those of 'base-a/b': a name must be able to name a folder"),
        ("{training.sed: {a: 1}}", "training.sed: no such key; did you mean seed"),
        ("{data.sources.2.path: {a: x}}", "sweep.data.sources.2.path: '2' is no index into a list of 2"),
    ],
)  # fmt: skip
def test_what_is_no_sweep(tmp_path, sweep, message):
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(BASE) + f"sweep: {sweep}\n")
    with pytest.raises(ConfigError, match=message):
        load_experiment(file, ["sweep=base-a"])
