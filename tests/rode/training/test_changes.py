"""--resume with a config that has changed since the run began."""

from __future__ import annotations

import pytest

from rode.training.config import ConfigError, load_experiment
from rode.training.train import train


@pytest.fixture
def begun(make_experiment):
    experiment = make_experiment(training={"max_steps": 1, "workers": 0})
    train(experiment, progress=False)
    return experiment


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate: expected 0.003, .* got 0.001;"),
        ({"training": {"batch_size": 2}}, "training.batch_size: expected 4, .* got 2;"),
        ({"training": {"seed": 5}}, "training.seed: expected 0, .* got 5;"),
        ({"adapter": {"ranks": [2, 8]}}, "adapter.ranks.1: expected 4, .* got 8;"),
        ({"adapter": {"alpha": 3}}, "adapter.alpha: expected None, .* got 3;"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype: expected 'float32', .* got 'bfloat16';"),
    ],
)
def test_what_cannot_change_is_refused(begun, make_experiment, change, key):
    before = (begun.run_dir / "config.yaml").read_bytes()
    change = {**change, "training": {"max_steps": 2, **change.get("training", {})}}
    with pytest.raises(ConfigError, match=rf"^{key} put it back"):
        train(make_experiment(**change), resume=True, progress=False)
    assert (begun.run_dir / "config.yaml").read_bytes() == before


def test_what_may_change_is_named(begun, make_experiment, caplog):
    experiment = make_experiment(training={"max_steps": 2, "save_steps": 1}, evaluation={"batch_size": 3})
    train(experiment, resume=True, progress=False)
    lines = [r.getMessage() for r in caplog.records if r.name == "rode.training.changes"]
    assert sorted(lines) == [
        "training.max_steps is 2 from here on; until checkpoint-1 it was 1",
        "training.save_steps is 1 from here on; until checkpoint-1 it was 100",
    ]
    assert load_experiment(begun.run_dir / "config.yaml") == experiment


def test_a_config_of_an_older_version(begun, make_experiment, caplog):
    """Keys that it lacks, and keys that are gone, say nothing about the run."""
    file = begun.run_dir / "config.yaml"
    lines = [line for line in file.read_text().splitlines() if "on_nonfinite" not in line]
    file.write_text("\n".join(lines) + "\nformer: 3\n")
    train(make_experiment(training={"max_steps": 2}), resume=True, progress=False)
    (begun.run_dir / "config.yaml").unlink()
    train(make_experiment(training={"max_steps": 3, "seed": 2}), resume=True, progress=False)


def test_a_key_that_came_later_had_its_default(begun, make_experiment):
    file = begun.run_dir / "config.yaml"
    lines = file.read_text().replace("on_bad_record", "on_bad_image").splitlines()  # its former name
    file.write_text("\n".join(line for line in lines if "picture_shape" not in line) + "\n")
    with pytest.raises(ConfigError, match=r"^model.picture_shape: expected 'processor', .* got 'pad';"):
        train(make_experiment(model={"picture_shape": "pad"}), resume=True, progress=False)
