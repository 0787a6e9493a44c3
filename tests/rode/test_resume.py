"""Going on with a run: from which checkpoint, from which not, and not at all where it is done."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rode.checkpoints import latest_checkpoint, starting_point
from rode.train import train


def weights(directory):
    return load_file(directory / "adapter_model.safetensors")


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def four_steps(make_recipe, examples):
    """A function that makes the recipe of a run with a checkpoint every two steps, trained for `steps` of them."""

    def run(steps=4):
        recipe = make_recipe(training={"max_steps": steps, "save_steps": 2, "save_total_limit": 10})
        train(recipe, examples=examples, progress=False)
        return recipe

    return run


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_without_a_part_is_refused(four_steps, examples, name):
    recipe = four_steps()
    recipe.training.max_steps = 6
    (recipe.run_dir / "checkpoint-4" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"checkpoint-4/{name} is missing, and without it"):
        train(recipe, examples=examples, resume=True, progress=False)
    with pytest.raises(FileNotFoundError, match=f"checkpoint-4/{name} is missing"):
        train(recipe, examples=examples, resume=recipe.run_dir / "checkpoint-4", progress=False)
    rest = train(recipe, examples=examples, resume=recipe.run_dir / "checkpoint-2", progress=False)
    assert rest.metrics["steps"] == 6


def checkpoint_of(folder, random):
    checkpoint = folder / "checkpoint-3"
    checkpoint.mkdir()
    for name in ("optimizer.pt", "scheduler.pt", *random):
        (checkpoint / name).touch()
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    return checkpoint


def ranks(*numbers):
    return [f"rng_state_{number}.pth" for number in numbers]


@pytest.mark.parametrize(
    ("random", "processes", "error", "words"),
    [
        (ranks(0), 2, FileNotFoundError, "rng_state_1.pth is missing, and without it"),
        (ranks(1), 2, FileNotFoundError, "rng_state_0.pth is missing, and without it"),
        ([], 2, FileNotFoundError, "rng_state_0.pth is missing, and without it"),
        (
            ["rng_state.pth"],
            2,
            ValueError,
            "rng_state_0.pth is missing, .* of one process and this run has 2",
        ),
        (ranks(0, 1), 1, ValueError, "rng_state.pth is missing, .* of 2 processes and this run has 1"),
        (ranks(0, 1, 2), 2, ValueError, "of 3 processes and this run has 2; start it with as many"),
    ],
)
def test_each_process_needs_its_random_state(tmp_path, random, processes, error, words):
    checkpoint_of(tmp_path, random)
    with pytest.raises(error, match=words):
        starting_point(tmp_path, True, processes)


def test_as_many_processes_go_on(tmp_path):
    checkpoint = checkpoint_of(tmp_path, ranks(0, 1, 2))
    assert starting_point(tmp_path, True, 3) == checkpoint


@pytest.mark.parametrize("text", ["", '{"global_step": 4, "log_hist', "null"])
def test_a_torn_checkpoint_is_passed_over(four_steps, examples, tmp_path, caplog, text):
    recipe = four_steps()
    whole = weights(recipe.run_dir)
    (recipe.run_dir / "checkpoint-4" / "trainer_state.json").write_text(text)
    assert latest_checkpoint(recipe.run_dir).name == "checkpoint-2"
    train(recipe, examples=examples, resume=True, progress=False)
    lines = [r.getMessage() for r in caplog.records if "cut short" in r.getMessage()]
    torn = recipe.run_dir / "checkpoint-4" / "trainer_state.json"
    assert lines == [f"{torn} was cut short while it was written: going on from checkpoint-2"]
    assert_same(weights(recipe.run_dir), whole)
    assert latest_checkpoint(recipe.run_dir).name == "checkpoint-4"  # written anew


def test_nothing_but_torn_checkpoints_is_one_error(four_steps, examples):
    recipe = four_steps(2)
    torn = recipe.run_dir / "checkpoint-2" / "trainer_state.json"
    torn.write_text("")
    with pytest.raises(FileNotFoundError, match=r"checkpoint-2/trainer_state.json was cut short .* no whole"):
        train(recipe, examples=examples, resume=True, progress=False)
    with pytest.raises(ValueError, match=r"checkpoint-2/trainer_state.json was cut short"):
        train(recipe, examples=examples, resume=torn.parent, progress=False)
    train(recipe, examples=examples, progress=False)  # and without --resume it trains anew
    assert latest_checkpoint(recipe.run_dir) == torn.parent
