"""The runs of a table: planned, compared with what is there, then trained and evaluated in processes of their own, so that
memory is freed after each and a crash loses one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rode.evaluation import PARTIAL
from rode.paper.answers import answers_path, keep_answers
from rode.paper.results import (
    adapter_differences,
    collect,
    differences,
    file_hash,
    plain,
    read_result,
    result_path,
    settings,
)
from rode.paper.tables import Tables
from rode.training import sweep
from rode.training.config import ConfigError, Experiment, dump_experiment, load_experiment, saved_config
from rode_food.atomic import write_json, write_text

Call = Callable[[Sequence[str]], int]
NOT_COMPARED = frozenset({"output_dir"})
OURS = ("name", "output_dir", "training.seed", sweep.KEY)


class RunFailed(RuntimeError):
    """A process of a run ended with an error, which it has said itself."""


@dataclass(frozen=True)
class Run:
    """One variant with one seed.

    Attributes:
        experiment: resolved; its output_dir is the run's folder.
        base: name of the config below the variant.
        result: the file that its result is kept in.
        data: file of records, or vocabulary -> hash.
    """

    experiment: Experiment
    base: str
    result: Path
    data: dict[str, str]

    def __str__(self) -> str:
        return f"{self.experiment.name} seed {self.experiment.training.seed}"

    @property
    def state(self) -> Literal["finished", "trained", "begun", "new"]:
        """How far it has come: "trained" lacks the evaluation, "begun" has a checkpoint to go on from."""
        from rode.training.checkpoints import latest_checkpoint

        folder = self.experiment.run_dir
        if self.result.is_file():
            return "finished"
        if (folder / "training.json").is_file():
            return "trained"
        return "new" if latest_checkpoint(folder) is None else "begun"


def plan(
    tables: Tables,
    variants: Iterable[str],
    seeds: Iterable[int],
    *,
    base: Path,
    base_name: str,
    overrides: Sequence[str] = (),
    results: Path,
    runs: Path,
) -> list[Run]:
    """The runs, each seed of all variants before the next seed; every config is checked before anything starts.

    Args:
        base: config below the variants.
        base_name: its name, by which results and run folders are kept apart.
        overrides: of every config.
        results, runs: folders of results and of run folders.

    Raises:
        ConfigError, FileNotFoundError: configs and files of records.
        ValueError: a result or a run folder that another config or other data has made.
    """
    for assignment in overrides:
        key = assignment.partition("=")[0]
        if key in OURS:
            raise ConfigError(
                f"override {assignment!r}: {key} is set here for each run: see --only, --seeds, --runs and --results"
            )
    hashes: dict[str, str] = {}
    out = []
    for seed in seeds:
        for variant in variants:
            experiment = tables.load(variant, overrides, base)
            experiment.name, experiment.training.seed = variant, seed
            experiment.output_dir = str(runs / base_name / f"{variant}-seed{seed}")
            for source in experiment.data.sources:
                if source.path not in hashes:
                    hashes[source.path] = file_hash(source.path)
            data = {source.path: hashes[source.path] for source in experiment.data.sources}
            if (vocabulary := experiment.evaluation.vocabulary) is not None:
                if vocabulary not in hashes:
                    hashes[vocabulary] = file_hash(vocabulary, "vocabulary", "evaluation.vocabulary")
                data[vocabulary] = hashes[vocabulary]
            run = Run(experiment, base_name, result_path(results, base_name, variant, seed), data)
            _check_unchanged(run)
            out.append(run)
    return out


def _check_unchanged(run: Run) -> None:
    """Checks that what is there of a run was made by its config; raises ValueError."""
    if run.result.is_file():
        result = read_result(run.result)
        place, then, data = run.result, result["config"], result["data"]
        mend = "give its settings again, move the file away, or write to another folder with --results"
    elif (file := saved_config(run.experiment.run_dir)) and run.state != "new":
        try:
            then, data = plain(load_experiment(file)), run.data
        except ConfigError as error:
            raise ValueError(f"{run}: {error}; delete its folder to begin anew") from error
        place, mend = (
            run.experiment.run_dir,
            "give its settings again, delete the folder, or use another with --runs",
        )
    else:
        return
    now = plain(run.experiment)
    found = differences(settings(now, run.data), settings(then, data), NOT_COMPARED)
    found += adapter_differences(now, then)
    if found:
        raise ValueError(f"{run}: {place} was made by another config: {'; '.join(found)}; {mend}")


def call(command: Sequence[str]) -> int:
    """Runs a command to its end; its exit code.

    A Ctrl-C (or SIGTERM) goes on to the command, whose end is waited for: training leaves a checkpoint then.

    Raises:
        KeyboardInterrupt: after the end of a command that was interrupted.
    """
    child: subprocess.Popen[bytes] | None = None
    asked = False

    def forward(*_: object) -> None:
        nonlocal asked
        asked = True
        if child is not None and os.name == "posix":
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGINT)

    before: dict[signal.Signals, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with suppress(ValueError):  # not in the main thread: whoever runs us there keeps the signals
                before[number] = signal.signal(number, forward)
        # a group of its own, or a Ctrl-C would come twice, from the terminal and from here, and the second stops at once
        child = subprocess.Popen(list(command), start_new_session=os.name == "posix")
        if asked:
            forward()
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked or code == 130:
        raise KeyboardInterrupt
    return code


def _shown(command: Sequence[str]) -> str:
    """The command as it can be typed elsewhere."""
    return shlex.join("python" if word == sys.executable else word for word in command)


class Attempts:
    """The processes that a run took, kept in its folder: it may be stopped and gone on with."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "attempts.json"
        self.entries: list[dict[str, Any]] = []
        if self.path.is_file():
            self.entries = json.loads(self.path.read_text(encoding="utf-8"))

    def make(self, command: Sequence[str], call: Call) -> int:
        """Calls and takes down; passes on what `call` raises."""
        start, code = time.monotonic(), None  # interrupted: no exit code
        try:
            code = call(command)
        finally:
            seconds = round(time.monotonic() - start, 1)
            self.entries.append({"command": _shown(command), "seconds": seconds, "exit_code": code})
            write_json(self.path, self.entries)
        return code


def carry_out(run: Run, *, call: Call, launcher: Sequence[str] = (), quiet: bool = False) -> None:
    """Trains (or goes on from the latest checkpoint), evaluates and writes the result.

    Args:
        call: runs a command; this module's, but for tests.
        launcher: what starts training, in place of this Python: `LAUNCHER -m rode train ...`. Evaluation takes one process.
        quiet: no progress bars.

    Raises:
        RunFailed: training or evaluation ended with an error. KeyboardInterrupt: it was stopped.
    """
    state, folder = run.state, run.experiment.run_dir
    if state == "finished":
        return
    config_file = folder / "config.yaml"
    options = ["--quiet"] if quiet else []
    if state == "new":
        (folder / "attempts.json").unlink(missing_ok=True)
    attempts = Attempts(folder)
    python = [sys.executable, "-m", "rode"]
    if state != "trained":
        write_text(config_file, dump_experiment(run.experiment))
        resume = ["--resume"] if state == "begun" else []
        start = [*launcher, "-m", "rode"] if launcher else python
        _succeed(run, "training", attempts.make([*start, "train", str(config_file), *resume, *options], call))
        if not (folder / "training.json").is_file():
            raise RunFailed(
                f"{run}: training ended without {folder / 'training.json'}: does the launcher wait for its processes?"
            )
    go_on = ["--resume"] if (folder / "evaluation" / PARTIAL).exists() else []
    evaluation = [*python, "evaluate", str(config_file), *go_on, *options]
    _succeed(run, "evaluation", attempts.make(evaluation, call))
    if run.experiment.evaluation.keep_answers:  # before the result, which says that the run is finished
        keep_answers(folder / "evaluation" / "predictions.jsonl", answers_path(run.result))
    write_json(run.result, collect(run.experiment, run.base, run.data, attempts.entries))


def _succeed(run: Run, what: str, code: int) -> None:
    if code:
        raise RunFailed(f"{run}: {what} ended with exit code {code}")
