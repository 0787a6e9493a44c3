"""The input of a stage, and the parts in which long stages keep what they have done."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from rode_food.atomic import replacing
from rode_food.progress import Progress
from rode_food.records import FoodRecord, read_records

if TYPE_CHECKING:
    from rode_food.unifood.settings import UnifoodSettings

Key = TypeVar("Key")
PART = 200
"""Lines of one part: what a killed stage does again at most, for each worker."""


class Engine(Protocol):
    """Where work on single records runs; see `rode_food.unifood.engines`."""

    def map(
        self, function: Callable[[list[str]], list[str]], parts: Iterable[tuple[Key, list[str]]]
    ) -> Iterator[tuple[Key, list[str]]]:
        """`function` over the lines of each part, in processes; results as they come, with the part's key."""
        ...


@dataclass(frozen=True)
class Stage:
    """The input of a stage's `run(stage) -> report`.

    It reads `source`, writes `output` (aside, then renamed) and whatever else it leaves in `folder`, and returns
    JSON-able numbers about what it did. It can be killed at any time and called again: what is whole in `folder` is
    used, and the result is the same as that of an undisturbed run.

    Attributes:
        name: of the stage.
        folder: its own; it exists.
        source: records of the stage before; None for the first.
        settings: of the whole build.
        engine: for work on single records.
        progress: show bars.
        dry_run: say what would be done and what it would cost, and change nothing.
        key: of what the stage's result depends on, its settings and its input; parts under another key are not used.
    """

    name: str
    folder: Path
    source: Path | None
    settings: UnifoodSettings
    engine: Engine
    progress: bool = True
    dry_run: bool = False
    key: str = ""

    @property
    def output(self) -> Path:
        return self.folder / "records.jsonl"

    def records(self) -> Iterator[FoodRecord]:
        """The records of the stage before, their images absolute."""
        if self.source is None:
            raise ValueError(f"stage {self.name}: no stage before it")
        return read_records(self.source)

    def in_parts(
        self, name: str, function: Callable[[list[str]], list[str]], lines: Iterable[str], part: int = PART
    ) -> Iterator[str]:
        """`function` over `lines`, `part` of them at a time, each part kept on disk once it is done.

        Args:
            name: of the folder in which parts are kept; `drop_parts(name)` removes them when their result is written.
            function: from lines to as many lines or any other number; runs in other processes, so a module's own
                function or a `functools.partial` of one. The same lines must give the same result.
            lines: the same ones at every call, none holding a line break.
            part: lines of a part.

        Returns:
            All results in order, without line breaks.
        """
        folder = self._parts(name)
        folder.mkdir(exist_ok=True)

        def path(number: int) -> Path:
            return folder / f"{number:06d}.jsonl"

        total = 0
        bar = Progress(desc=f"{self.name}: {name}", unit="record", show=self.progress)

        def missing() -> Iterator[tuple[tuple[int, int], list[str]]]:
            nonlocal total
            rows = iter(lines)
            while chunk := list(itertools.islice(rows, part)):
                if path(total).exists():
                    bar.update(len(chunk))
                else:
                    yield (total, len(chunk)), chunk
                total += 1

        with bar:
            for (number, size), rows in self.engine.map(function, missing()):
                with replacing(path(number)) as out:
                    out.writelines(f"{row}\n" for row in rows)
                bar.update(size)
        for number in range(total):
            with path(number).open(encoding="utf-8", newline="\n") as results:
                for row in results:
                    yield row.rstrip("\n")

    def drop_parts(self, name: str) -> None:
        """Removes the parts of `name`, a glob pattern, those of other keys as well."""
        for folder in self.folder.glob(f"{name}.*.parts"):
            shutil.rmtree(folder, ignore_errors=True)

    def _parts(self, name: str) -> Path:
        return self.folder / f"{name}.{self.key[:16]}.parts"
