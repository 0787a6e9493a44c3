"""Recipes of the paper's open questions: what changes between them, and that nothing else does."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from rode.training.config import ALL_TASKS, load_recipe, recipe_from_dict

RECIPES = Path(__file__).parents[3] / "configs"
FILES = {file.stem: file for file in sorted((RECIPES / "questions").glob("*.yaml"))}
RANKS = ([2, 4, 8, 16], [7, 7, 8, 8], [1, 1, 4, 24], [15, 15], [30])


def values(name):
    return yaml.safe_load(FILES[name].read_text())


def joined(ranks):
    return "-".join(map(str, ranks))


def test_there_is_one_for_each_case():
    want = {"top1-2-4-8-16", "data-1-8", "data-1-4", "data-1-2", "data-1"}
    want |= {
        f"ranks-{joined(ranks)}{task}" for ranks in RANKS for task in ("", *(f"-{t}" for t in ALL_TASKS))
    }
    assert set(FILES) == want


@pytest.mark.parametrize("name", FILES)
def test_each_is_a_recipe_by_its_name(name):
    found = values(name)
    assert found.pop("extends") == "../unifood-7b.yaml"
    assert found["name"] == name
    # the paper's run but for what is asked
    full = load_recipe(RECIPES / "unifood-rode-7b.yaml")
    recipe = recipe_from_dict({**asdict(full), **found})
    for key in set(full.adapter) | set(recipe.adapter):
        assert key in ("ranks", "gate", "top_k") or recipe.adapter[key] == full.adapter[key]
    (source,), (usual,) = recipe.data.sources, full.data.sources
    assert source == replace(usual, tasks=source.tasks, fraction=source.fraction)


@pytest.mark.parametrize("ranks", RANKS, ids=joined)
def test_rank_sets_have_one_total(ranks):
    assert sum(ranks) == 30
    for task in ("", *ALL_TASKS):
        found = values(f"ranks-{joined(ranks)}" + (f"-{task}" if task else ""))
        assert found["adapter"]["ranks"] == ranks
        assert found["adapter"]["gate"] == "relu"
        tasks = found["data"]["sources"][0]["tasks"] if task else None
        assert tasks == ([task] if task else None)


def test_fractions_of_the_data():
    for name, fraction in (("data-1-8", 0.125), ("data-1-4", 0.25), ("data-1-2", 0.5), ("data-1", 1)):
        assert values(name)["data"]["sources"][0]["fraction"] == fraction
