"""A small label job: made-up dishes with pictures, and the stage over them. As a script it runs the stage, to be killed.

python label_job.py FOLDER SETTINGS_AS_JSON
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from rode_food.records import FoodRecord, Ingredient, write_records
from rode_food.settings import build
from rode_food.unifood.engines import LocalEngine
from rode_food.unifood.label.run import run
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.stage import Stage

FAST = {
    "api_key_env": None,
    "timeout": 5.0,
    "backoff": 0.01,
    "retries": 3,
    "concurrency": 4,
    "poll": 0.01,
    "image_side": 64,
}


@dataclass
class Settings:
    """As much of a build's settings as the stage reads."""

    label: LabelSettings


def dish(folder: Path, number: int, *lines: str) -> FoodRecord:
    """Record `dNN` with a picture of one colour; without lines, "100 g food NN" and "50 g rice"."""
    image = folder / "images" / f"{number}.png"
    image.parent.mkdir(exist_ok=True)
    Image.new("RGB", (96, 80), (number % 256, 90, 200)).save(image)
    lines = lines or (f"100 g food{number:02d}", "50 g rice")
    ingredients = tuple(Ingredient(name=line.split()[-1], text=line) for line in lines)
    return FoodRecord(
        f"d{number:02d}", str(image), "kitchen", title=f"dish {number}", ingredients=ingredients
    )


def make_job(folder: Path, count: int = 6, records: Iterable[FoodRecord] | None = None) -> Path:
    """Writes `source.jsonl` into the folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_records(
        folder / "source.jsonl", records if records is not None else [dish(folder, i) for i in range(count)]
    )
    return folder


def stage_of(folder: Path, *, into: str = "label", dry_run: bool = False, **settings: Any) -> Stage:
    """The stage over `folder/source.jsonl`, in `folder/label`."""
    inside = folder / into
    inside.mkdir(exist_ok=True)
    label = build(LabelSettings, FAST | settings, "label")
    return Stage(
        "label",
        inside,
        folder / "source.jsonl",
        Settings(label),
        LocalEngine(),
        progress=False,
        dry_run=dry_run,
    )


def serve_forks() -> None:
    """Reads [folder, settings] as JSON lines; runs the stage in a fork for each, and prints its id and how it ended."""
    import openai

    openai.OpenAI(api_key="none").chat.completions  # noqa: B018  loaded at first use, which each fork would pay for
    for line in sys.stdin:
        folder, settings = json.loads(line)
        child = os.fork()
        if not child:
            code = 1
            try:
                run(stage_of(Path(folder), **settings))
                code = 0
            finally:
                os._exit(code)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


class Forks:
    """A process that has imported what the stage needs, which takes seconds, and forks those that are to be killed."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )

    def start(self, folder: Path, settings: dict[str, Any]) -> int:
        """Its id."""
        self.process.stdin.write(json.dumps([str(folder), settings]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> int:
        """Waits; the exit code of the one that was started last, below 0 for a signal."""
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


if __name__ == "__main__":
    serve_forks()
