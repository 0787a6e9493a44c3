"""The ledger: what it keeps, and what becomes of a job when its disk is full, locked or damaged."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from label_job import make_job, stage_of
from rode_food.unifood.label import LabelError
from rode_food.unifood.label.ledger import Change, Ledger, Reply
from rode_food.unifood.label.run import run
from vision_server import VisionServer


def reply(text="{}", **more):
    raw = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
    return Reply(
        raw, **{**dict(prompt_tokens=7, answer_tokens=3, estimated=False, price=0.5, max_tokens=9), **more}
    )


def mark(key, price=2.5):
    return key, "record", "model", "1", price


def test_what_was_under_way_is_open_again_and_counts_as_lost(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.start([mark("a"), mark("b"), mark("c")])
        ledger.record([Change("a", "answered", reply=reply("é"), attempts=2, lost=0.25)])
        ledger.record([Change("c", "no answer", "no answer", "HTTP 500", attempts=4)])
        assert ledger.get("c").status == "no answer"
    with Ledger(path) as ledger:
        assert ledger.get("a").replies[0].text == "é"
        assert ledger.get("a").replies[0].turn == 1
        assert [ledger.get(key).status for key in "abc"] == ["answered", "open", "open"]
        assert ledger.get("d") is None
        totals = ledger.totals()
        assert (totals["cost"], totals["lost"], totals["reserved"]) == (0.5, 2.75, 0.0)
        assert (totals["answers"], totals["input_tokens"], totals["output_tokens"]) == (1, 7, 3)
    assert not (tmp_path / "ledger.sqlite.spare").exists()


def test_a_batch_keeps_its_contents_until_it_is_done(tmp_path):
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as ledger:
        ledger.new_batch("t1", 100, [mark("a"), mark("b")])
        ledger.new_batch("t2", 50, [mark("c")])
        ledger.batch_created("t1", "batch-1", "file-1")
    with Ledger(path) as ledger:
        assert [(b.token, b.id, b.file, b.requests) for b in ledger.batches()] == [
            ("t1", "batch-1", "file-1", 2),
            ("t2", None, None, 1),
        ]
        assert ledger.totals()["reserved"] == 7.5
        ledger.drop_batch("t2")
        ledger.record([Change("a", "answered", reply=reply())], done_batch="t1")
        assert ledger.batches() == []
        assert [ledger.get(key).status for key in "abc"] == ["answered", "open", "open"]
        assert ledger.totals()["reserved"] == ledger.totals()["lost"] == 0.0


def test_one_run_at_a_time(tmp_path):
    with (
        Ledger(tmp_path / "ledger.sqlite"),
        pytest.raises(
            LabelError,
            match=r"ledger .*ledger.sqlite: database is locked; another run or program is using it",
        ),
    ):
        Ledger(tmp_path / "ledger.sqlite")


def test_a_file_that_is_no_ledger(tmp_path):
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(LabelError, match="file is not a database; restore it from a copy"):
        Ledger(path)
    assert path.read_bytes() == b"something else entirely" * 100


class Full(sqlite3.Connection):
    """A disk that is full from the fourth answer on, for as long as the spare file takes its room."""

    answers = 0
    spare = None

    def execute(self, sql, *rest):
        if sql.startswith("INSERT INTO replies"):
            Full.answers += 1
            if Full.answers > 3 and Full.spare.exists():
                raise sqlite3.OperationalError("database or disk is full")
        return super().execute(sql, *rest)


def connecting(monkeypatch, factory=sqlite3.Connection, pragma=""):
    connect = sqlite3.connect

    def opened(path, **settings):
        connection = connect(path, **settings, factory=factory)
        connection.execute(pragma)
        return connection

    monkeypatch.setattr(sqlite3, "connect", opened)


def test_a_full_disk_loses_no_answer(tmp_path):
    """The spare room is given up for the answers under way; then the job stops."""
    folder = make_job(tmp_path, 12)
    Full.answers, Full.spare = 0, folder / "label" / "ledger.sqlite.spare"
    with VisionServer(delay=0.01) as server:
        with pytest.MonkeyPatch.context() as patch:
            connecting(patch, Full)
            with pytest.raises(
                LabelError, match=r"ledger\.sqlite: database or disk is full; make room and run again"
            ):
                run(stage_of(folder, base_url=server.url))
        first = len(server.requests)
        assert 4 <= first <= 8
        with closing(sqlite3.connect(folder / "label" / "ledger.sqlite")) as ledger:
            assert ledger.execute("SELECT count(*) FROM replies").fetchone() == (first,)
        report = run(stage_of(folder, base_url=server.url))
        assert len(server.requests) == 12
    assert report["labelled"] == 12


def test_a_ledger_that_cannot_grow(tmp_path):
    """SQLite's own word of a full disk, with no spare room to give up: what was kept is kept, the rest is asked again."""
    folder = make_job(tmp_path, 30)
    with VisionServer() as server:
        with pytest.MonkeyPatch.context() as patch:
            connecting(patch, pragma="PRAGMA max_page_count = 11")
            with pytest.raises(
                LabelError, match="database or disk is full; make room and run again"
            ) as error:
                run(stage_of(folder, base_url=server.url))
        assert "\n" not in str(error.value)
        first = len(server.requests)
        with closing(sqlite3.connect(folder / "label" / "ledger.sqlite")) as ledger:
            kept = ledger.execute("SELECT count(*) FROM replies").fetchone()[0]
        assert 1 <= kept < first < 30
        assert first - kept <= 5
        assert not (folder / "label" / "records.jsonl").exists()
        report = run(stage_of(folder, base_url=server.url))
        assert len(server.requests) == first + 30 - kept
    assert report["labelled"] == 30
