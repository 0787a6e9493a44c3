"""kill -9 at many points: nothing that was answered and kept is asked again, and the end is that of an undisturbed run."""

from __future__ import annotations

import itertools
import os
import signal
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from label_job import Forks, make_job, stage_of
from rode_food.unifood.label.run import run
from vision_server import VisionServer

FAULTS = {"food01": "kilojoules at first", "food03": "prose", "food05": ["ok", "500"]}


@pytest.fixture(scope="module")
def forks():
    forks = Forks()
    yield forks
    forks.close()


def kept(folder: Path) -> set[tuple[str, int]]:
    """(record, turn) of every answer in the ledger."""
    path = folder / "label" / "ledger.sqlite"
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path)) as ledger:
        try:
            query = "SELECT record, turn FROM replies JOIN contents USING (key)"
            return set(ledger.execute(query))
        except sqlite3.OperationalError:  # killed before there was a table
            return set()


def written(folder: Path, into: str = "label") -> tuple[bytes, bytes]:
    return (folder / into / "records.jsonl").read_bytes(), (folder / into / "set_aside.jsonl").read_bytes()


def undisturbed(folder: Path, **settings) -> tuple[bytes, bytes]:
    """Over the same source, in another stage folder."""
    faults = {words: plan if isinstance(plan, str) else list(plan) for words, plan in FAULTS.items()}
    with VisionServer(faults=faults) as server:
        run(stage_of(folder, into="undisturbed", base_url=server.url, **settings))
    return written(folder, "undisturbed")


def requests_of(server: VisionServer) -> list[tuple[str, int]]:
    return [(f"d{seen.question.split('food')[1][:2]}", seen.turn) for seen in server.requests]


class Killer:
    """A hook of the server that kills the process at given events, each an event's name and the number from which on it counts: of
    what runs at the same time nobody knows which comes first."""

    def __init__(self, forks: Forks, at: list[tuple[str, int]]) -> None:
        self.forks = forks
        self.at = at
        self.process: int | None = None
        self.lock = threading.Lock()

    def __call__(self, event: str, number: int) -> None:
        with self.lock:
            if self.process is None or not self.at:
                return
            name, least = self.at[0]
            if event == name and number >= least:
                self.at.pop(0)
                os.kill(self.process, signal.SIGKILL)
                self.process = None

    def run_to_the_end(
        self, folder: Path, settings: dict, server: VisionServer
    ) -> tuple[list[set[tuple[str, int]]], list[int]]:
        """Starts the stage until it ends well; the answers in the ledger and the requests seen, after each kill."""
        ledgers, marks = [], []
        while True:
            with self.lock:  # so that no event comes before the process is known
                self.process = self.forks.start(folder, settings)
            code = self.forks.end()
            if code == 0:
                return ledgers, marks
            assert code == -signal.SIGKILL
            ledgers.append(kept(folder))
            marks.append(len(server.requests))


@pytest.mark.usefixtures("tagger")
def test_live(forks, tmp_path):
    folder = make_job(tmp_path, 10)
    end = undisturbed(folder)
    # 13 requests, and one more at least for each kill by a request, which is not answered then: there is a fifteenth
    killer = Killer(forks, [("chat", 2), ("chat", 9), ("answered", 11), ("chat", 15)])
    with VisionServer(faults={**FAULTS}, hook=killer, delay=0.005) as server:
        settings = {"base_url": server.url, "concurrency": 3}
        ledgers, marks = killer.run_to_the_end(folder, settings, server)
        assert len(ledgers) == 4
        seen = requests_of(server)
        for mark, answered in zip(marks, ledgers, strict=True):
            assert not answered & set(seen[mark:]), "an answer in the ledger was asked for again"
        # beyond the questions of an undisturbed run (12 answers, one 500), only what was in flight at a kill: 3 at most
        assert len(seen) <= 13 + 3 * 4
    assert (
        len(ledgers[1]) >= 1
    )  # the seventh request of a run with 3 at a time follows on answers that are kept
    assert all(a <= b for a, b in itertools.pairwise(ledgers))
    assert written(folder) == end
    assert len(kept(folder)) == 12


@pytest.mark.parametrize(
    "points",
    [
        [("upload", 1), ("uploaded", 2), ("create", 3), ("created", 4)],
        [("created", 1), ("retrieve", 2), ("content", 1), ("content", 4)],
    ],
    ids=["making", "fetching"],
)
@pytest.mark.usefixtures("tagger")
def test_batch(forks, tmp_path, points):
    folder = make_job(tmp_path, 8)
    end = undisturbed(folder, mode="batch")
    kills = len(points)
    killer = Killer(forks, points)
    with VisionServer(faults={**FAULTS}, hook=killer, polls=1) as server:
        settings = {"base_url": server.url, "mode": "batch", "batch_requests": 3}
        ledgers, _ = killer.run_to_the_end(folder, settings, server)
        assert len(ledgers) == kills
        # nothing at all is asked twice: 8 questions, 2 follow-ups and a second try after the 500
        assert sorted(requests_of(server)) == sorted(
            [(f"d{i:02d}", 1) for i in range(8)] + [("d01", 2), ("d03", 2)]
        )
        # no batch was made that nobody takes in, and no file was left behind
        assert all(batch["status"] == "completed" for batch in server.batches.values())
        assert not [
            name for name, _ in server.files.values() if name.startswith("batch-") and "_file_id" not in name
        ]
    assert written(folder) == end
    assert len(kept(folder)) == 10
