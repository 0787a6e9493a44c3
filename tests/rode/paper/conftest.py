"""A base config over one file of records, and a stand-in for the processes of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rode.cli import main
from rode.training.config import load_experiment

CONFIGS = Path(__file__).parents[3] / "configs" / "paper"
SACREBLEU = {"relu-8888": (9.0, 10.0, 12.0), "softmax-8888": (8.0, 8.0, 8.5)}
"""What the stand-in measures with seeds 0, 1 and 2; other variants get their seed."""


class Processes:
    """Leaves what training and evaluation leave, without a model.

    Attributes:
        calls: the commands.
        failing: (step, variant) that end with code 1.
        stopped: (step, variant) that are interrupted, once each, training after a checkpoint.
    """

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failing: set[tuple[str, str]] = set()
        self.stopped: set[tuple[str, str]] = set()

    def __call__(self, command: Sequence[str]) -> int:
        self.calls.append(list(command))
        step, path = command[command.index("rode") + 1 :][:2]
        experiment = load_experiment(path)
        folder, key = experiment.run_dir, (step, experiment.name)
        if key in self.failing:
            return 1
        if key in self.stopped:
            self.stopped.remove(key)
            if step == "train":
                (folder / "checkpoint-3").mkdir(parents=True)
                (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
            raise KeyboardInterrupt
        getattr(self, step)(experiment, folder)
        return 0

    def train(self, experiment: Any, folder: Path) -> None:
        count = 1000 * sum(experiment.adapter["ranks"])
        metrics = {"trainable_parameters": count, "steps": 6, "examples": 12, "train_loss": 1.5}
        write(folder / "training.json", {"metrics": metrics, "machine": "1 x cpu, 2 CPU cores (x86_64)"})
        write(folder / "history.json", [{"step": i, "loss": 3.0 / i} for i in range(1, 7)] + [{"step": 6}])

    def evaluate(self, experiment: Any, folder: Path) -> None:
        seed = experiment.training.seed
        value = SACREBLEU.get(experiment.name, (0.0, 1.0, 2.0))[seed]
        write(folder / "evaluation" / "metrics.json", {"all": {"sacrebleu": value, "n_recipe": 4}, "s": {}})
        if experiment.adapter["gate"] == "none":
            return
        experts = len(experiment.adapter["ranks"])
        gates = {"all": [seed + 0.25 * i for i in range(experts)], "image": None, "text": None}
        layers = [
            {
                "name": f"layers.{block}.q_proj",
                "block": block,
                "adapter": "default",
                "ranks": experiment.adapter["ranks"],
                "tokens": {"all": 9, "image": 0, "text": 0},
                "open_rate": gates,
                "mean_gate": gates,
            }
            for block in (0, 1)
        ]
        write(folder / "evaluation" / "gates.json", {"layers": layers})

    def steps(self) -> list[tuple[str, str, bool]]:
        """(step, run, resumed) of each call, and forget them."""
        out = [
            (call[call.index("rode") + 1], Path(call[call.index("rode") + 2]).parent.name, "--resume" in call)
            for call in self.calls
        ]
        self.calls.clear()
        return out


def write(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    stand_in = Processes()
    monkeypatch.setattr("rode.paper.runs.call", stand_in)
    return stand_in


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A config "small" with its file of records, in tmp_path."""
    (tmp_path / "records.jsonl").write_text("{}\n")
    values = {
        "name": "small",
        "model": {"path": "models/small"},
        "data": {"sources": [{"path": str(tmp_path / "records.jsonl")}]},
        "training": {"max_steps": 6},
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "small.yaml"


@pytest.fixture
def reproduce(base: Path, tmp_path: Path) -> Callable[..., int]:
    """`rode reproduce` over that base, with everything in tmp_path."""

    def run(*argv: str) -> int:
        folders = ["--configs", CONFIGS, "--results", tmp_path / "results", "--runs", tmp_path / "runs"]
        return main(["reproduce", *argv, "--base", str(base), *map(str, folders), "--quiet"])

    return run
