from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from forked import forked
from killed import kill_everywhere
from made_up_dishes import dishes
from rode.cli import main
from rode_food.records import read_records, write_records
from rode_food.settings import SettingsError
from rode_food.unifood import stage as stage_module
from rode_food.unifood.build import build_unifood, load_settings
from rode_food.unifood.engines import LocalEngine
from rode_food.unifood.settings import SourceSettings

from .conftest import small_settings

FIRST = ("select", "categorise")


def build(settings: Any, out: Path, *stages: str, **options: Any) -> list[Any]:
    return build_unifood(
        settings, out, engine=LocalEngine(), stages=stages or FIRST, progress=False, **options
    )


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    source = dishes(tmp_path / "in", 12)
    settings = small_settings(source, size=8)
    out = tmp_path / "out"
    first = build(settings, out)
    assert [(result.name, result.fresh) for result in first] == [("select", True), ("categorise", True)]
    before = snapshot(out)
    again = build(settings, out)
    assert [(result.name, result.fresh) for result in again] == [("select", False), ("categorise", False)]
    assert [result.report for result in again] == [result.report for result in first]
    assert snapshot(out) == before
    settings.golden.tolerance = 0.5  # of a later stage
    assert not any(result.fresh for result in build(settings, out))
    settings.select.size = 6
    assert all(result.fresh for result in build(settings, out))
    assert len(list(read_records(out / "categorise" / "records.jsonl"))) == 6
    assert all(result.fresh for result in build(settings, out, redo=True))
    # the sources are read again; what cannot be done again stays until it is
    lines = source.read_text().splitlines(keepends=True)
    source.write_text("".join(lines[:4]))
    assert build(settings, out, redo=True)[1].report["records"] == 4
    source.unlink()
    with pytest.raises(ValueError, match="is not a file"):
        build(settings, out, redo=True)
    assert len(list(read_records(out / "select" / "records.jsonl"))) == 4


def test_a_source_that_has_changed_is_read_again(tmp_path: Path) -> None:
    source = dishes(tmp_path / "in", 12)
    settings, out = small_settings(source), tmp_path / "out"
    build(settings, out)
    records = list(read_records(source))
    write_records(source, records[:10])
    # select's candidates are not taken from the folder either
    assert [result.report["records"] for result in build(settings, out)] == [10, 10]
    source.rename(tmp_path / "away.jsonl")
    assert not any(result.fresh for result in build(settings, out)), "what is done needs its source no more"
    photos = small_settings(tmp_path / "in", kind="food-photos")
    (tmp_path / "in" / "photos.json").write_text("[]")
    build(photos, tmp_path / "other")
    assert not any(result.fresh for result in build(photos, tmp_path / "other"))
    (tmp_path / "in" / "more.txt").touch()
    assert [result.fresh for result in build(photos, tmp_path / "other")] == [True, False]


def test_a_stage_needs_the_one_before_it(tmp_path: Path) -> None:
    settings = small_settings(dishes(tmp_path / "in", 8))
    out = tmp_path / "out"
    with pytest.raises(
        ValueError,
        match=r"stage categorise: stage select has not run in .*out; run first: rode data .*out --stage select$",
    ):
        build(settings, out, "categorise")
    build(settings, out, "select")
    build(settings, out, "categorise")
    settings.select.size = 4
    with pytest.raises(
        ValueError,
        match=r"stage categorise: settings or input of stage select have changed since it ran; run first: .* --stage select$",
    ):
        build(settings, out, "categorise")
    with pytest.raises(
        ValueError, match=r"stage: expected one of select, categorise, label, .*, got 'lable'"
    ):
        build(settings, out, "lable")
    with pytest.raises(ValueError, match="dry run: stage select has none"):
        build(settings, out, "select", dry_run=True)


def test_a_dry_run_says_what_must_run_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = dishes(tmp_path / "in", 12)
    file, out = tmp_path / "build.yaml", tmp_path / "fresh"
    file.write_text(f"sources: [{{kind: records, path: {source}}}]\ncategorise: {{min_count: 2}}\n")
    command = ["data", "build-unifood", str(file), str(out), "--quiet", "--workers", "1"]
    assert main([*command, "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert said == (
        f"rode: stage label: stage select has not run in {out}; run first: "
        f"rode data build-unifood SETTINGS.yaml {out} --stage select --stage categorise\n"
    )
    assert not out.exists(), "a dry run leaves nothing behind"
    first = said.partition(f"SETTINGS.yaml {out} ")[2].split()
    assert main([*command, *first]) == 0
    assert main([*command, "--dry-run"]) == 0
    assert "label: dry run True, records 12, settled 0, to ask 12" in capsys.readouterr().out
    assert main([*command, "--stage", "golden", "--dry-run"]) == 1
    assert capsys.readouterr().err.endswith(f"{out} --stage label --stage aggregate\n")
    assert not (out / "golden").exists()
    # changed settings of the first stage name every stage after it, too
    assert main([*command, "--dry-run", "select.size=8"]) == 1
    said = capsys.readouterr().err
    assert "settings or input of stage select have changed since it ran; run first: " in said
    assert said.endswith("--stage select --stage categorise\n")


def test_words_are_explained_before_they_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = dishes(tmp_path / "in", 12)
    with source.open("a") as out:
        out.write("{\n")
    file = tmp_path / "build.yaml"
    file.write_text(f"sources: [{{kind: records, path: {source}}}]\ncategorise: {{min_count: 2}}\n")
    command = ["data", "build-unifood", str(file), str(tmp_path / "out"), "--quiet", "--workers", "1"]
    assert main([*command, "--stage", "select"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "left out means not used: broken, or without what a record needs, such as a picture"
    assert lines[1].startswith("select: read 12, left out (1 invalid JSON)")
    # and in the other commands that count entries
    assert main(["data", "inspect", str(source), "--samples", "0"]) == 0
    said = capsys.readouterr().out
    assert "broken (damaged, or of another form than the layout's: not used): 1\n  1 x invalid JSON\n" in said
    assert "left out (sound, but without what a record needs, such as a picture: not used): 0\n" in said
    assert "noted (used, with a doubt): 0" in said
    assert main(["data", "convert", "records", str(source), str(tmp_path / "r.jsonl")]) == 0
    said = capsys.readouterr().out
    assert said.index("left out means") < said.index("; left out 1 with invalid JSON")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("select.size", 0, "select.size: expected at least 1, got 0"),
        ("select.max_ingredients", 1, "select.max_ingredients: expected at least 2, got 1"),
        ("select.near_duplicate_bits", 16, "select.near_duplicate_bits: expected at most 15, got 16"),
        (
            "select.split_fractions",
            {"train": 0.5},
            "select.split_fractions: split fractions: expected a sum of 1, got 0.5",
        ),
        (
            "aggregate.micronutrient_coverage",
            1.5,
            "aggregate.micronutrient_coverage: expected at most 1, got 1.5",
        ),
        ("vocabulary.min_count", 0, "vocabulary.min_count: expected at least 1, got 0"),
        ("sources", [], "sources: expected at least one, got none"),
        (
            "sources",
            [SourceSettings("recipe2m", "a")],
            r"sources\[0\].kind: no such kind; did you mean recipe1m",
        ),
        ("name", "all", 'name: "all" stands for all sources'),
    ],
)
def test_values_that_cannot_be_meant(tmp_path: Path, key: str, value: Any, message: str) -> None:
    settings = small_settings(tmp_path / "r.jsonl")
    part, _, name = key.rpartition(".")
    setattr(getattr(settings, part) if part else settings, name, value)
    with pytest.raises(SettingsError, match=message):
        build(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_builds_do_not_share_a_folder(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another build is at work there"):
            build(small_settings(tmp_path), out)


def test_killed_at_every_point_the_first_stages_end_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage_module.Stage.in_parts, "__defaults__", (3,))
    source = dishes(tmp_path / "in", 16)
    shutil.copy(tmp_path / "in" / "images" / "00003.jpg", tmp_path / "in" / "images" / "00000.jpg")
    settings = small_settings(source, size=10)
    build(settings, tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    out = tmp_path / "out"

    def check() -> None:
        assert snapshot(out) == whole

    points = kill_everywhere(
        lambda: build(settings, out), lambda: shutil.rmtree(out, ignore_errors=True), check
    )
    assert points >= 2 * 12


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = dishes(tmp_path / "in", 12)
    settings = tmp_path / "build.yaml"
    settings.write_text(f"sources: [{{kind: records, path: {source}}}]\ncategorise: {{min_count: 2}}\n")
    command = ["data", "build-unifood", str(settings), str(tmp_path / "out"), "--quiet", "--workers", "1"]
    assert main([*command, "--stage", "select", "select.size=8", "--stage", "categorise"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("select: read 12, left out (none), candidates 12, pictures checked 8,")
    assert out[1].startswith("categorise: records 8, stated 0, from title ")
    assert main([*command, "--stage", "select", "select.sizes=8"]) == 1
    assert "select.sizes: no such key; did you mean size?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parents[3] / "configs" / "build").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_settings_that_come_with_it(file: Path) -> None:
    settings = load_settings(file, ["select.size=7"])
    settings.check()
    settings.label.check()
    assert settings.select.size == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: []\nselct: {}\n", "selct: no such key; did you mean select"),
        ("name: a\n", "sources: missing; expected a list of a mapping"),
        ("- a\n", "expected a mapping at the top, got list"),
        ("a: [\n", "not YAML"),
    ],
)
def test_settings_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "build.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_settings(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such settings"):
        load_settings(tmp_path / "none.yaml")


@pytest.mark.parametrize("most", [0, 100, 1500])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path, most: int) -> None:
    settings = small_settings(dishes(tmp_path / "in", 16), size=10)
    build(settings, tmp_path / "whole")
    out, said = tmp_path / "out", tmp_path / "said"

    def run() -> None:
        # a file can grow so far and no further, as on a disk that is full
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        try:
            build(settings, out)
            message = "no error"
        except OSError as error:
            message = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(message)

    assert forked(run) == 0
    assert said.read_text().startswith("[Errno 27] File too large: ")
    assert str(out) in said.read_text()
    assert not list(out.rglob("*.tmp"))
    build(settings, out)
    assert snapshot(out) == snapshot(tmp_path / "whole")
