"""All stages in a row, over HTTP on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from killed import kill_everywhere
from made_up_dishes import FOODS, dishes
from rode.cli import main
from rode_food.records import NUTRITION_FIELDS, read_records
from rode_food.unifood import stage as stage_module
from rode_food.unifood.build import STAGES, build_unifood
from rode_food.unifood.engines import LocalEngine, RayEngine
from rode_food.unifood.settings import UnifoodSettings
from tagger import need_tagger
from vision_answers import foods_of
from vision_server import VisionServer

from .conftest import small_settings


def food(name: str, mass: float) -> dict[str, float]:
    values = FOODS[name.split()[-1]]
    return {
        key: value * mass / 100
        for key, value in zip(("energy", "fat", "protein", "carb"), values, strict=True)
    }


@contextmanager
def settings_of(source: Path, usda: Path, server: VisionServer, **select: Any) -> Iterator[UnifoodSettings]:
    need_tagger()
    with server:
        settings = small_settings(source, **select)
        settings.label.base_url = server.url
        settings.label.api_key_env = None
        settings.label.image_side = 64
        settings.label.backoff = 0.01
        settings.golden.usda = str(usda)
        settings.golden.max_category_share = 0.5
        settings.shard.size = 4
        yield settings


def snapshot(out: Path) -> dict[str, bytes]:
    """Everything but the ledger, which knows when it was asked."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and not path.name.startswith("ledger")
    }


@pytest.mark.data
def test_made_up_dishes_from_their_source_to_shards(tmp_path: Path, rode_data: Path) -> None:
    source = dishes(tmp_path / "in", 24)
    out = tmp_path / "out"
    server = VisionServer(food, faults={"40 g": ["429 after"], "3. ": ["500", "truncated"]})
    with settings_of(source, rode_data / "usda", server, size=20) as settings:
        results = build_unifood(settings, out, engine=LocalEngine(), progress=False)
        asked = len(server.requests)
        again = build_unifood(settings, out, engine=LocalEngine(), progress=False)
        assert len(server.requests) == asked
    assert [result.name for result in results] == list(STAGES)
    assert not list(out.rglob("*.parts")), "what was kept for a stop is of no use any more"
    assert not list(out.rglob(".*.tmp"))
    assert not any(result.fresh for result in again)
    report = {result.name: result.report for result in results}
    assert report["label"]["labelled"] == report["aggregate"]["records"] == 20
    assert report["golden"]["checked"] == 5
    records = list(read_records(out / "records.jsonl"))
    assert len(records) == 20 - sum(report["golden"]["dropped"].values())
    for record in records:
        assert record.nutrition is not None
        for i, name in enumerate(NUTRITION_FIELDS):
            per = [
                (part.mass or 0) * (1 if i == 0 else FOODS[part.name][i - 1] / 100)
                for part in record.ingredients
            ]
            # the server answers with four digits
            assert getattr(record.nutrition, name) == pytest.approx(sum(per), abs=1e-3)
    assert report["shard"]["records"] == {"train": 10, "val": 5, "test": len(records) - 15}
    assert json.loads((out / "statistics" / "statistics.json").read_text())["records"] == len(records)


@pytest.mark.data
def test_what_the_server_did_not_answer_is_asked_at_the_next_run(tmp_path: Path, rode_data: Path) -> None:
    source = dishes(tmp_path / "in", 8)
    out = tmp_path / "out"
    stages = STAGES[:4]
    server = VisionServer(food, faults={"1. ": ["500"]})
    with settings_of(source, rode_data / "usda", server) as settings:
        settings.label.retries = 0
        settings.label.concurrency = 1
        first = build_unifood(settings, out, engine=LocalEngine(), stages=stages, progress=False)
        assert (first[2].report["labelled"], first[2].report["unanswered"]) == (7, 1)
        assert first[3].report["records"] == 7
        second = build_unifood(settings, out, engine=LocalEngine(), stages=stages, progress=False)
        assert [result.fresh for result in second] == [False, False, True, True]
        assert second[3].report["records"] == 8
        assert len(server.requests) == 9
        third = build_unifood(settings, out, engine=LocalEngine(), stages=stages, progress=False)
        assert not any(result.fresh for result in third)


@pytest.mark.slow
@pytest.mark.data
def test_killed_at_every_point_a_build_ends_alike(
    tmp_path: Path, rode_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module.Stage.in_parts, "__defaults__", (4,))
    source = dishes(tmp_path / "in", 10)
    out, stages = tmp_path / "out", STAGES[:-1]
    with settings_of(source, rode_data / "usda", VisionServer(food), size=8) as settings:

        def build() -> None:
            build_unifood(settings, out, engine=LocalEngine(), stages=stages, progress=False)

        build()
        whole = snapshot(out)

        def check() -> None:
            assert snapshot(out) == whole

        assert kill_everywhere(build, lambda: shutil.rmtree(out), check) > 60


@pytest.mark.slow
@pytest.mark.data
def test_ray_and_local_processes_write_the_same_bytes(
    tmp_path: Path, rode_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module.Stage.in_parts, "__defaults__", (4,))
    source = dishes(tmp_path / "in", 24)
    with settings_of(source, rode_data / "usda", VisionServer(food), size=20) as settings:
        for name, engine in (("one", LocalEngine()), ("local", LocalEngine(2)), ("ray", RayEngine(2))):
            build_unifood(settings, tmp_path / name, engine=engine, progress=False)
    assert snapshot(tmp_path / "ray") == snapshot(tmp_path / "local") == snapshot(tmp_path / "one")


@pytest.mark.data
def test_photographs_of_dishes(tmp_path: Path, rode_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The walk of docs/unifood.md: real photographs and recipes, the real tables, a server that answers from them."""
    need_tagger()
    settings = tmp_path / "build.yaml"
    settings.write_text(
        f"""\
name: my-dishes
sources: [{{kind: food-photos, path: {rode_data / "food_photos"}}}]
select: {{size: 40, max_ingredients: 15}}
label: {{model: tables, api_key_env: null, image_side: 64}}
golden: {{usda: {rode_data / "usda"}, uncheckable: keep}}
shard: {{size: 10, format: parquet}}
"""
    )
    command = ["data", "build-unifood", str(settings), str(tmp_path / "out"), "--quiet", "--workers", "1"]
    with VisionServer(foods_of(rode_data / "usda" / "sr28_foods.csv")) as server:
        url = f"label.base_url={server.url}"
        assert main([*command, "--stage", "select", "--stage", "categorise"]) == 0
        assert main([*command, "--stage", "label", "--dry-run", url]) == 0
        assert not server.requests
        said = capsys.readouterr().out
        assert "to ask 40" in said
        prices = ("label.price_input=2", "label.price_output=8", "label.max_tokens=1000")
        assert main([*command, "--stage", "label", url, *prices, "label.budget=0.1"]) == 3
        said = capsys.readouterr().err
        assert "rode: label: the budget of 0.1 is reached" in said
        assert 0 < len(server.requests) < 40
        assert main([*command, "--stage", "label", url, "label.concurrency=0"]) == 1
        assert "label.concurrency: expected at least 1, got 0" in capsys.readouterr().err
        assert main([*command, url]) == 0
    said = capsys.readouterr().out
    assert said.startswith("left out means not used: broken, or without what a record needs")
    assert said.count("left out means") == 1
    assert "\nselect: done already; read 201" in said
    records = list(read_records(tmp_path / "out" / "records.jsonl"))
    assert len(records) > 20
    assert all(record.nutrition is not None and record.nutrition.complete for record in records)
    assert {record.source for record in records} == {"my-dishes"}
