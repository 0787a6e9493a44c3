"""The builder: stages one after another, each in its own folder, each resumable and repeatable alone.

A finished stage leaves `done.json` with a key of what its result depends on, its own settings and the bytes of its input,
and with the sizes and times of the files that it read outside of the build (a source's, the USDA's). A stage for which
these have not changed is not run again (but for questions that the label stage got no answer to); one for which they have is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from rode_food.atomic import write_json
from rode_food.records import read_records, write_records
from rode_food.settings import SettingsError, build, override, read_mapping
from rode_food.unifood.settings import UnifoodSettings
from rode_food.unifood.stage import Engine, Stage

_SETTINGS = {
    "select": ("sources", "name", "select", "categorise"),
    "categorise": ("categorise",),
    "label": ("label",),
    "aggregate": ("aggregate",),
    "golden": ("golden",),
    "shard": ("name", "shard"),
    "statistics": ("name", "vocabulary"),
}
"""Stage -> the parts of the settings that its result depends on, in the order in which stages run."""
STAGES = tuple(_SETTINGS)


_DRY = ("label", "golden", "shard", "statistics")


@dataclass(frozen=True)
class StageResult:
    """The outcome of one stage: `report` is what it counted; `fresh` is False where it was done already."""

    name: str
    report: dict[str, Any]
    fresh: bool

    def __str__(self) -> str:
        text = ", ".join(f"{name.replace('_', ' ')} {_show(value)}" for name, value in self.report.items())
        return f"{self.name}: {'' if self.fresh else 'done already; '}{text}"


def _show(value: object) -> str:
    if isinstance(value, dict):
        return "(" + (", ".join(f"{_show(v)} {k}" for k, v in value.items()) or "none") + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def load_settings(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> UnifoodSettings:
    """Settings from a YAML file.

    Args:
        path: the file; paths in it are relative to the working directory.
        overrides: "select.size=500", "label.model=...": values as YAML.

    Raises:
        FileNotFoundError; SettingsError for unknown keys, wrong types and impossible values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such settings")
    values = read_mapping(path)
    try:
        for assignment in overrides:
            override(values, assignment)
        return build(UnifoodSettings, values)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def build_unifood(
    settings: UnifoodSettings,
    out: str | os.PathLike[str],
    *,
    engine: Engine,
    stages: Sequence[str] = STAGES,
    redo: bool = False,
    dry_run: bool = False,
    progress: bool = True,
    tell: Callable[[StageResult], None] = lambda result: None,
) -> list[StageResult]:
    """Runs the stages that are not done; a call after a crash goes on where it was.

    Args:
        settings: of the whole build.
        out: the build's folder, one below it for each stage; `records.jsonl` in it is what golden leaves.
        engine: where work on single records runs; the bytes do not depend on it.
        stages: which to run, in the builder's order; those before them must be done, else the error names them.
        redo: run them although they are done.
        dry_run: only say what the stages would do, by default what labelling would cost; nothing is sent.
        progress: show bars.
        tell: called after each stage.

    Raises:
        ValueError: an unknown stage, a stage whose input is missing, another build at work in `out`.
        OSError, SettingsError, RecordError, ImageError: what the stage cannot go on with.
    """
    for name in stages:
        if name not in STAGES:
            raise ValueError(f"stage: expected one of {', '.join(STAGES)}, got {name!r}")
    if dry_run:
        stages = ("label",) if set(stages) == set(STAGES) else stages
        for name in stages:
            if name not in _DRY:
                raise ValueError(f"dry run: stage {name} has none; it costs time alone, and can be stopped")
    settings.check()
    out = Path(out)
    results = []
    if dry_run:
        _check_before(settings, out, min(stages, key=STAGES.index))  # which leaves no folder behind
    with _alone(out):
        for left in out.rglob(".*.tmp"):  # of a build that was killed: nobody else writes here now
            left.unlink()
        for name in STAGES:
            if name not in stages:
                continue
            results.append(_run(settings, out, name, engine, redo, dry_run, progress))
            tell(results[-1])
    return results


def _run(
    settings: UnifoodSettings, out: Path, name: str, engine: Engine, redo: bool, dry_run: bool, progress: bool
) -> StageResult:
    _check_before(settings, out, name)
    source = _source(out, name)
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "done.json"
    key, outside = _key(settings, name, out, source), _outside(settings, name)
    if done.is_file() and not (redo or dry_run):
        earlier = json.loads(done.read_text(encoding="utf-8"))
        # a source that is not at hand any more has not changed
        same = all(state in (None, earlier["outside"].get(path)) for path, state in outside.items())
        # what a server did not answer is asked again
        if earlier["key"] == key and same and not earlier["report"].get("unanswered"):
            return StageResult(name, earlier["report"], fresh=False)
    if not dry_run:
        done.unlink(missing_ok=True)  # from now on its files belong to no finished run
        if redo:
            _forget(folder, name)
    parts_key = hashlib.sha256(json.dumps([key, outside]).encode()).hexdigest()
    stage = Stage(name, folder, source, settings, engine, progress, dry_run, parts_key)
    report: dict[str, Any] = import_module(f"rode_food.unifood.{_MODULES.get(name, name)}").run(stage)
    if not dry_run:
        if name == "golden":  # what later stages write is the same in another form
            write_records(out / "records.jsonl", read_records(stage.output))
        write_json(done, {"key": key, "outside": outside, "report": report})
    return StageResult(name, report, fresh=True)


_MODULES = {"label": "label.run", "golden": "golden.run"}
_DECISIONS = "decisions.json"
_USED_AGAIN = {"select": "candidates.json", "shard": "shards"}
"""What a stage would take from its folder as done; --redo removes it, and leaves answers, decisions and, until they are
replaced, results."""


def _forget(folder: Path, name: str) -> None:
    for path in (*folder.glob("*.parts"), folder / _USED_AGAIN.get(name, "")):
        if path.is_dir() and path != folder:
            shutil.rmtree(path)
        elif path.is_file():
            path.unlink()


def _source(out: Path, name: str) -> Path | None:
    """The records that a stage reads."""
    number = STAGES.index(name)
    return out / STAGES[number - 1] / "records.jsonl" if number else None


def _check_before(settings: UnifoodSettings, out: Path, name: str) -> None:
    """Every stage before must have run, and with these settings. Raises ValueError that names all that must run first."""
    before = STAGES[: STAGES.index(name)]
    for number, earlier in enumerate(before):
        done = out / earlier / "done.json"
        if not done.is_file():
            why = f"stage {earlier} has not run in {out}"
        elif json.loads(done.read_text(encoding="utf-8"))["key"] != _key(
            settings, earlier, out, _source(out, earlier)
        ):
            why = f"settings or input of stage {earlier} have changed since it ran"
        else:
            continue
        stages = " ".join(f"--stage {stage}" for stage in before[number:])
        raise ValueError(
            f"stage {name}: {why}; run first: rode data build-unifood SETTINGS.yaml {out} {stages}"
        )


def _key(settings: UnifoodSettings, name: str, out: Path, source: Path | None) -> str:
    values = {part: _plain(getattr(settings, part)) for part in _SETTINGS[name]}
    digest = hashlib.sha256(json.dumps([name, values], sort_keys=True).encode())
    for path in (source, out / name / _DECISIONS):
        if path is not None and path.is_file():
            with path.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


def _outside(settings: UnifoodSettings, name: str) -> dict[str, Any]:
    """The files that a stage reads outside of the build, path -> state: name, size and time of each file or folder in it. Pictures
    deeper down are not looked at; those that are chosen are decoded."""
    paths: dict[str, list[str | None]] = {
        "select": [source.path for source in settings.sources],
        "golden": [settings.golden.usda],
    }
    return {path: _state(path) for path in paths.get(name, []) if path}


def _state(path: str) -> list[int] | list[list[object]] | None:
    try:
        if not os.path.isdir(path):
            found = os.stat(path)
            return [found.st_size, found.st_mtime_ns]
        with os.scandir(path) as entries:
            # of a folder the time alone: it changes with the names in it
            states = sorted(
                (entry.name, 0 if entry.is_dir() else entry.stat().st_size, entry.stat().st_mtime_ns)
                for entry in entries
            )
        return [[name, size, changed] for name, size, changed in states]  # lists, as JSON gives them back
    except OSError:
        return None


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two builds in one folder would overwrite each other's parts; the lock goes with the process that holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("a+") as lock:
        try:
            import fcntl
        except ImportError:  # Windows: nothing there says which process has gone
            yield
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{out}: another build is at work there; wait for it, or choose another folder"
            ) from None
        yield
