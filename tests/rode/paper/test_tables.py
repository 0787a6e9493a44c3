"""tables.yaml against the paper's printed tables, typed in here once more; names that lead nowhere are refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rode.paper.tables import read_tables
from rode.training.config import ConfigError, experiment_values, load_experiment

CONFIGS = Path(__file__).parents[3] / "configs" / "paper"
ITEMS = ("table2", "table3", "table4", "table5", "table6", "fig6", "fig7", "fig8")

# Columns as the paper has them.
TABLE_2 = """
lora-8        22.59 7.59 36.44 48.49 47.72 61.49 56.61 51.25 53.11
softmax-8888  24.54 8.7  38.5  49.23 48.24 60.59 58.37 51.87 53.66
relu-2-4-8-16 26.86 9.66 40.11 48.18 46.96 60.96 58.16 48.65 52.58
"""
TABLE_3 = """
lora-8        38.96 54.04 69.84 54.88 51.3  53.8
softmax-8888  39.31 53.6  67.14 52.99 49.59 52.53
relu-2-4-8-16 38.45 52.47 67.1  53.92 47.84 51.96
"""
ABLATIONS = """
lora-8        7.59 36.44 22.59 53.11  4
lora-32       8.39 36.68 22.7  54.14  4
top1-8888     8.28 37.2  24.08 53.53  4 5
softmax-8888  8.7  38.5  24.54 53.66  4 5
relu-8888     9.48 40.03 26.7  52.75  5 6
softmax-2468  8.66 38.15 24.54 53.22  5
relu-2468     9.4  39.67 26.76 52.63  5 6
relu-5555     8.4  38.04 25.02 53.42  6
relu-2-4-8-16 9.66 40.11 26.86 52.58  6
"""
FIELDS = ["pmae_mass", "pmae_energy", "pmae_fat", "pmae_protein", "pmae_carb"]


@pytest.fixture(scope="module")
def tables():
    return read_tables(CONFIGS)


def rows(text):
    return [(name, list(map(float, numbers))) for name, *numbers in map(str.split, text.strip().splitlines())]


@pytest.mark.parametrize(
    ("what", "text", "metrics"),
    [
        ("table2", TABLE_2, ["ingredient_iou", "sacrebleu", "rouge_l", *FIELDS, "pmae"]),
        ("table3", TABLE_3, [*FIELDS, "pmae"]),
    ],
)
def test_tables_2_and_3(tables, what, text, metrics):
    item = tables.item(what)
    assert item.metrics == metrics
    assert item.variants == [name for name, _ in rows(text)]
    paper = tables.data[item.data].paper
    for name, numbers in rows(text):
        assert [paper[name][metric] for metric in metrics] == numbers
        assert sum(paper[name][field] for field in FIELDS) / 5 == pytest.approx(
            paper[name]["pmae"], abs=0.0051
        )


@pytest.mark.parametrize("number", [4, 5, 6])
def test_the_ablations(tables, number):
    item = tables.item(f"table{number}")
    wanted = [(name, values[:4]) for name, values in rows(ABLATIONS) if number in values[4:]]
    paper = tables.data[item.data].paper
    assert item.metrics == ["sacrebleu", "rouge_l", "ingredient_iou", "pmae"]
    assert sorted(item.variants) == sorted(name for name, _ in wanted)
    for name, numbers in wanted:
        assert [paper[name][metric] for metric in item.metrics] == numbers


def test_nothing_else_is_printed(tables):
    """No number stands in the file that the tables above do not hold."""
    two = {name: 9 for name, _ in rows(TABLE_2)}
    counts = {name: two.get(name, 4) for name, _ in rows(ABLATIONS)}
    assert {name: len(numbers) for name, numbers in tables.data["unifood"].paper.items()} == counts
    assert [len(numbers) for numbers in tables.data["nutrition5k"].paper.values()] == [6, 6, 6]
    assert set(tables.items) == set(ITEMS)


def test_rows_say_what_the_variants_are(tables):
    routers = {"none": "none", "top-1": "top", "softmax": "softmax", "relu": "relu"}
    for name, variant in tables.variants.items():
        adapter = experiment_values(tables.config_file(name))["adapter"]
        assert variant.ranks == ",".join(map(str, adapter["ranks"]))
        assert adapter["gate"].startswith(routers[variant.router])
    assert tables.name(tables.item("table5"), "relu-2468") == "2,4,6,8 relu"


def test_bases(tables):
    assert load_experiment(tables.base(tables.item("fig7"))).name == "unifood-7b"
    nutrition = load_experiment(tables.config_file("lora-8"), base=tables.base(tables.item("table3")))
    assert [(s.name, s.tasks) for s in nutrition.data.sources] == [("nutrition5k", ["nutrition"])]
    shared = load_experiment(tables.config_file("lora-8"))
    assert nutrition.training == shared.training


def test_parameters_that_the_paper_plots(tables):
    # 64 layers of 4096 x 4096; RoDE's count is the one that test_config finds in the model
    adapted = tables.data["unifood"].adapted
    assert adapted.parameters(tables.variants["lora-8"]) == 64 * 8 * 8192 == 4_194_304
    assert adapted.parameters(tables.variants["relu-2-4-8-16"]) == 16_777_216
    assert adapted.parameters(tables.variants["top1-8888"]) == 64 * (32 * 8192 + 4 * 4096)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "variants: [softmax-8888, relu-8888]",
            "variants: [relu-888]",
            "items.fig6: variant 'relu-888': no such",
        ),
        (
            "    metrics: []",
            "    metrics: [bleu]",
            "items.fig6: metric 'bleu': no such one; did you mean sacrebleu",
        ),
        (
            "rouge_l: 36.68",
            "rouge: 36.68",
            "data.unifood.paper: metric 'rouge': no such one; did you mean rouge_l",
        ),
        (
            "sacrebleu: 8.39",
            "sacrebleu: good",
            "data.unifood.paper.lora-32.sacrebleu: expected a number, got 'good'",
        ),
        (
            "    kind: bars",
            "    kind: pie",
            "items.fig7.kind: expected one of table, heat_map, bars, parameters, comparisons, got 'pie'",
        ),
        ("  lora-8: {label", "  lora-9: {label", "variants.lora-9: expected its config in .*lora-9.yaml"),
    ],
)
def test_what_is_refused(tmp_path, old, new, message):
    shutil.copytree(CONFIGS, tmp_path / "paper")
    file = tmp_path / "paper" / "tables.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match=message) as error:
        read_tables(tmp_path / "paper")
    assert str(error.value).startswith(str(file))


def test_no_such_table_or_folder(tables, tmp_path):
    with pytest.raises(ConfigError, match="table or figure 'table7': no such one; did you mean table6"):
        tables.item("table7")
    with pytest.raises(FileNotFoundError, match="no such file; --configs names the folder"):
        read_tables(tmp_path)
