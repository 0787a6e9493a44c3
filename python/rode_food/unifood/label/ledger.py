"""The ledger: every answer that was paid for, in one SQLite file, by a hash of what was asked.

An answer is on disk (fsync) before anything follows from it. A request is marked before it is sent; one that was under way
when the process died may or may not have been answered, which nobody can tell: it is asked again, and what it may have cost
is counted as lost.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rode_food.unifood.label.errors import LabelError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS contents (
    key TEXT PRIMARY KEY,
    record TEXT NOT NULL,             -- the first record with this content
    model TEXT NOT NULL,
    prompt TEXT NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('in flight', 'open', 'answered', 'set aside', 'refused', 'no answer')),
    reason TEXT,
    detail TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    reserved REAL NOT NULL DEFAULT 0, -- what the request in flight may cost
    lost REAL NOT NULL DEFAULT 0,     -- what requests without an answer may have cost
    batch TEXT,
    first_asked REAL NOT NULL,        -- seconds since 1970
    changed REAL NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS under_way ON contents (status) WHERE status IN ('in flight', 'no answer');
CREATE TABLE IF NOT EXISTS replies (
    key TEXT NOT NULL,
    turn INTEGER NOT NULL,            -- 1: the question, 2: asked again
    raw TEXT NOT NULL,                -- the server's JSON as it came
    finish_reason TEXT,
    prompt_tokens INTEGER NOT NULL,
    answer_tokens INTEGER NOT NULL,
    estimated INTEGER NOT NULL,       -- 1: the server did not count tokens
    price REAL NOT NULL,
    max_tokens INTEGER NOT NULL,
    received REAL NOT NULL,
    PRIMARY KEY (key, turn)
);
CREATE TABLE IF NOT EXISTS batches (
    token TEXT PRIMARY KEY,           -- ours; the batch's metadata and its file's name carry it
    id TEXT,                          -- the server's, once it is known
    file TEXT,
    bytes INTEGER NOT NULL,
    requests INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('made', 'running', 'done')),
    created REAL NOT NULL
) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Reply:
    """One answer as it came, and what it took."""

    raw: dict[str, Any]
    prompt_tokens: int
    answer_tokens: int
    estimated: bool
    price: float
    max_tokens: int
    turn: int = 0
    """1, 2; set by the ledger."""

    @property
    def _choice(self) -> dict[str, Any]:
        choice: dict[str, Any] = self.raw["choices"][0]
        return choice

    @property
    def finish_reason(self) -> str | None:
        return self._choice.get("finish_reason")

    @property
    def text(self) -> str:
        return self._choice["message"].get("content") or ""

    @property
    def refusal(self) -> str | None:
        return self._choice["message"].get("refusal") or None


@dataclass(frozen=True)
class Content:
    """The ledger's knowledge of one content."""

    status: str
    reason: str | None
    detail: str | None
    replies: tuple[Reply, ...]


@dataclass(frozen=True)
class Change:
    """The fate of one content's request.

    Attributes:
        status: the new one.
        reply: to keep.
        attempts: requests that were sent for it.
        lost: what those without an answer may have cost.
    """

    key: str
    status: str
    reason: str | None = None
    detail: str | None = None
    reply: Reply | None = None
    attempts: int = 0
    lost: float = 0.0


@dataclass(frozen=True)
class BatchRow:
    token: str
    id: str | None
    file: str | None
    bytes: int
    requests: int
    created: float


class Ledger:
    """One process at a time, one thread of it. Everything raises LabelError: one line that names the file.

    Args:
        path: the file; ":memory:" for one that is kept nowhere.
        spare: bytes of a file beside it that are given up when the disk is full, so that answers under way still find room.
    """

    def __init__(self, path: str | os.PathLike[str], spare: int = 1 << 20) -> None:
        self.path = Path(path)
        self._spare = None if str(path) == ":memory:" else self.path.with_name(self.path.name + ".spare")
        self._connection: sqlite3.Connection | None = None
        self._full: LabelError | None = None
        try:
            if self._spare is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._spare.write_bytes(os.urandom(spare))  # zeros might be stored as nothing
            connection = sqlite3.connect(path, timeout=1.0, isolation_level=None)
            self._connection = connection
            # held until the end, by a lock that dies with the process: a second run would ask everything twice
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")  # an answer costs more than an fsync
            connection.executescript("BEGIN IMMEDIATE;" + _SCHEMA + "COMMIT;")
            self._transaction(self._forget_what_was_under_way)
        except (sqlite3.Error, OSError) as error:
            self.close()
            raise self._error(error) from error
        except LabelError:
            self.close()
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            with suppress(sqlite3.Error):  # everything was committed
                self._connection.close()
            self._connection = None
        if self._spare is not None:
            self._spare.unlink(missing_ok=True)

    def _error(self, error: Exception) -> LabelError:
        text = str(error)
        if "locked" in text:
            hint = "another run or program is using it, wait for that or stop it"
        elif "full" in text or isinstance(error, OSError):
            hint = "make room and run again, all answers so far are kept"
        elif "not a database" in text or "malformed" in text:
            hint = "restore it from a copy, or move it away to begin anew"
        else:
            hint = "see to the disk and run again"
        return LabelError(f"ledger {self.path}: {text}; {hint}")

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise LabelError(f"ledger {self.path}: closed")
        return self._connection

    def _transaction(self, write: Callable[[sqlite3.Connection], object]) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            write(self._db)
            self._db.execute("COMMIT")
        except (sqlite3.Error, LabelError) as error:
            with suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            raise error if isinstance(error, LabelError) else self._error(error) from error

    @staticmethod
    def _forget_what_was_under_way(db: sqlite3.Connection) -> None:
        db.execute(
            "UPDATE contents SET status = 'open', lost = lost + reserved, reserved = 0"
            " WHERE status = 'in flight' AND batch IS NULL"
        )
        db.execute("UPDATE contents SET status = 'open' WHERE status = 'no answer'")

    # reading

    def get(self, key: str) -> Content | None:
        try:
            row = self._db.execute(
                "SELECT status, reason, detail FROM contents WHERE key = ?", (key,)
            ).fetchone()
            if row is None:
                return None
            status, reason, detail = row
            rows = self._db.execute(
                "SELECT raw, prompt_tokens, answer_tokens, estimated, price, max_tokens, turn FROM replies"
                " WHERE key = ? ORDER BY turn",
                (key,),
            )
            replies = tuple(Reply(json.loads(r[0]), r[1], r[2], bool(r[3]), *r[4:]) for r in rows)
        except sqlite3.Error as error:
            raise self._error(error) from error
        return Content(status, reason, detail, replies)

    def totals(self) -> dict[str, Any]:
        """Over all that the ledger holds: `answers`, `input_tokens`, `output_tokens`, `estimated` (answers whose tokens
        were not counted by the server), `cost`, `lost`, and `reserved` by batches under way."""
        try:
            answers = self._db.execute(
                "SELECT count(*), coalesce(sum(prompt_tokens), 0), coalesce(sum(answer_tokens), 0),"
                " coalesce(sum(estimated), 0), total(price) FROM replies"
            ).fetchone()
            money = self._db.execute("SELECT total(lost), total(reserved) FROM contents").fetchone()
        except sqlite3.Error as error:
            raise self._error(error) from error
        names = ("answers", "input_tokens", "output_tokens", "estimated", "cost", "lost", "reserved")
        return dict(zip(names, (*answers, *money), strict=True))

    def batches(self) -> list[BatchRow]:
        """The batches that are not done, oldest first."""
        try:
            rows = self._db.execute(
                "SELECT token, id, file, bytes, requests, created FROM batches WHERE state != 'done'"
                " ORDER BY created, token"
            ).fetchall()
        except sqlite3.Error as error:
            raise self._error(error) from error
        return [BatchRow(*row) for row in rows]

    def members(self, token: str) -> Iterator[tuple[str, float]]:
        """Key and reserved money of each content that waits for the batch."""
        try:
            rows = self._db.execute(
                "SELECT key, reserved FROM contents WHERE batch = ? ORDER BY key", (token,)
            ).fetchall()
        except sqlite3.Error as error:
            raise self._error(error) from error
        yield from rows

    # writing

    def _mark(
        self, db: sqlite3.Connection, asked: Iterable[tuple[str, str, str, str, float]], batch: str | None
    ) -> None:
        if self._full is not None:
            raise self._full
        now = time.time()
        db.executemany(
            "INSERT INTO contents (key, record, model, prompt, reserved, status, batch, first_asked, changed)"
            " VALUES (?, ?, ?, ?, ?, 'in flight', ?, ?, ?) ON CONFLICT (key) DO UPDATE SET status = 'in flight',"
            " reason = NULL, detail = NULL, reserved = excluded.reserved, batch = excluded.batch, changed = excluded.changed",
            ((*entry, batch, now, now) for entry in asked),
        )

    def start(self, asked: Sequence[tuple[str, str, str, str, float]]) -> None:
        """Before requests are sent: (key, record id, model, prompt version, what it may cost) of each."""
        self._transaction(lambda db: self._mark(db, asked, None))

    def record(self, changes: Sequence[Change], done_batch: str | None = None) -> None:
        """Writes the fate of requests, all or nothing; with `done_batch`, that batch is done too, and what it did not
        answer is open again.

        On a full disk it gives up the spare room; the error comes with the next request that is to be made.
        """

        def write(db: sqlite3.Connection) -> None:
            now = time.time()
            for change in changes:
                if change.reply is not None:
                    reply = change.reply
                    db.execute(
                        "INSERT INTO replies SELECT ?, coalesce(max(turn), 0) + 1, ?, ?, ?, ?, ?, ?, ?, ? FROM replies"
                        " WHERE key = ?",
                        (
                            change.key,
                            json.dumps(reply.raw, ensure_ascii=False),
                            reply.finish_reason,
                            reply.prompt_tokens,
                            reply.answer_tokens,
                            int(reply.estimated),
                            reply.price,
                            reply.max_tokens,
                            now,
                            change.key,
                        ),
                    )
                db.execute(
                    "UPDATE contents SET status = ?, reason = ?, detail = ?, attempts = attempts + ?, reserved = 0,"
                    " lost = lost + ?, batch = NULL, changed = ? WHERE key = ?",
                    (
                        change.status,
                        change.reason,
                        change.detail,
                        change.attempts,
                        change.lost,
                        now,
                        change.key,
                    ),
                )
            if done_batch is not None:
                db.execute(
                    "UPDATE contents SET status = 'open', reserved = 0, batch = NULL WHERE batch = ?",
                    (done_batch,),
                )
                db.execute("UPDATE batches SET state = 'done' WHERE token = ?", (done_batch,))

        try:
            self._transaction(write)
        except LabelError as error:
            if self._spare is None or not self._spare.exists():
                raise
            self._spare.unlink()
            self._transaction(write)
            self._full = error

    def new_batch(self, token: str, size: int, asked: Sequence[tuple[str, str, str, str, float]]) -> None:
        """Before the batch's file is uploaded."""

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO batches (token, bytes, requests, state, created) VALUES (?, ?, ?, 'made', ?)",
                (token, size, len(asked), time.time()),
            )
            self._mark(db, asked, token)

        self._transaction(write)

    def batch_uploaded(self, token: str, file: str) -> None:
        self._transaction(lambda db: db.execute("UPDATE batches SET file = ? WHERE token = ?", (file, token)))

    def batch_created(self, token: str, batch: str, file: str) -> None:
        self._transaction(
            lambda db: db.execute(
                "UPDATE batches SET id = ?, file = ?, state = 'running' WHERE token = ?", (batch, file, token)
            )
        )

    def drop_batch(self, token: str) -> None:
        """It never came to be; what was in it is open again."""

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE contents SET status = 'open', reserved = 0, batch = NULL WHERE batch = ?", (token,)
            )
            db.execute("DELETE FROM batches WHERE token = ?", (token,))

        self._transaction(write)
