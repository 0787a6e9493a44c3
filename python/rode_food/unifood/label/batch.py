"""Batch mode: OpenAI's Batch API, so that a killed run finds its batches again and asks nothing twice.

A batch's life in the ledger: "made" with its contents before anything leaves this machine, then the uploaded file, then
"running" with the server's id, then "done" together with all its answers. Its metadata and its file's name carry our own
token, by which a run that was killed in between finds it at the server.
"""

from __future__ import annotations

import itertools
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rode_food.atomic import replacing
from rode_food.unifood.label.answers import Misses, change_by_fault, change_by_reply, make_reply
from rode_food.unifood.label.client import Endpoint, Fault, RequestFailed, check_completion, fault_of_status
from rode_food.unifood.label.errors import LabelError
from rode_food.unifood.label.ledger import BatchRow, Change, Ledger
from rode_food.unifood.label.price import Budget
from rode_food.unifood.label.prompt import encode_picture, request_body
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.work import Item, Verdict, Work, judge

if TYPE_CHECKING:
    from openai.types import Batch, FileObject

T = TypeVar("T")

_TOKEN = "rode_label"
"""Key of the metadata that holds our token."""
_WORKING = {"validating", "in_progress", "finalizing", "cancelling"}
_LIMITS = {"token_limit_exceeded", "rate_limit_exceeded"}
"""Codes of a batch that fails for want of room in the account's queue; it may be made again later."""


class Batches:
    """One run's dealings with the Batch API."""

    def __init__(
        self,
        work: Work,
        ledger: Ledger,
        endpoint: Endpoint,
        budget: Budget,
        folder: Path,
        settled: Callable[[], object],
    ) -> None:
        self.work = work
        self.ledger = ledger
        self.endpoint = endpoint
        self.budget = budget
        self.folder = folder
        self.settled = settled
        self.settings: LabelSettings = work.settings
        self._misses = Misses(self.settings.give_up_after)
        self._tries: Counter[str] = Counter()
        self._crowded = False
        self._failed_batches = 0

    def run(self) -> tuple[bool, bool, int]:
        """Finds what was under way, then submits and fetches until all is done, or once if it is not to wait.

        Returns:
            Whether the budget sufficed, whether nothing is left to wait for, and requests being worked on.
        """
        for left_over in self.folder.glob("batch-*.jsonl"):
            left_over.unlink()
        for batch in self.ledger.batches():
            if batch.id is None:
                self._find_again(batch)
            self.budget.reserved += sum(reserved for _, reserved in self.ledger.members(batch.token))
        within_budget, to_submit, settled = True, True, self.settled
        while True:
            to_submit |= self._fetch_all()
            running = self.ledger.batches()
            if to_submit and not (self._crowded and running):
                within_budget, to_submit = self._submit(settled)
                settled = _nothing  # counted once
                running = self.ledger.batches()
            if not (running or to_submit):
                return within_budget, True, 0
            if not self.settings.wait:
                return within_budget, False, sum(batch.requests for batch in running)
            time.sleep(self.settings.poll)

    # submitting

    def _submit(self, settled: Callable[[], object]) -> tuple[bool, bool]:
        """Makes batches of all that is to be asked; (whether the budget sufficed, whether something had to wait)."""
        self._crowded = False
        lines = self._lines(self.work.to_ask(self.ledger, settled))
        while True:
            if len(self.ledger.batches()) >= self.settings.batches_at_once:
                return True, next(lines, None) is not None
            token = secrets.token_hex(8)
            path = self.folder / f"batch-{token}.jsonl"
            asked: list[tuple[str, str, str, str, float]] = []
            size, enough = 0, True
            with replacing(path, "wb") as out:
                for item, verdict, line in lines:
                    mark = item.mark(verdict, self.settings)
                    if asked and size + len(line) > self.settings.batch_bytes:
                        lines = itertools.chain([(item, verdict, line)], lines)
                        break
                    if not self.budget.reserve(mark[-1]):
                        enough = False
                        break
                    out.write(line)
                    asked.append(mark)
                    size += len(line)
                    if len(asked) == self.settings.batch_requests:
                        break
            if asked:
                self.ledger.new_batch(token, size, asked)
                try:
                    file = self._call(partial(self._upload, path))
                except LabelError:
                    self.ledger.drop_batch(token)  # a file alone asks nothing
                    raise
                self.ledger.batch_uploaded(token, file.id)
                self._create(token, file.id)
            path.unlink()
            if not asked or not enough:
                return enough, False

    def _lines(self, work: Iterator[tuple[Item, Verdict]]) -> Iterator[tuple[Item, Verdict, bytes]]:
        """Each request as a line of a batch's file; some pictures are encoded ahead, in threads."""
        settings = self.settings

        def line(one: tuple[Item, Verdict]) -> bytes | OSError:
            item, verdict = one
            try:
                picture = encode_picture(item.image, settings.image_side)
            except OSError as error:
                return error
            body = request_body(picture, item.lines, settings, verdict.failed)
            request = {"custom_id": item.key, "method": "POST", "url": "/v1/chat/completions", "body": body}
            return json.dumps(request, ensure_ascii=False).encode() + b"\n"

        with ThreadPoolExecutor(settings.concurrency) as pool:
            while window := list(itertools.islice(work, 4 * settings.concurrency)):
                for (item, verdict), made in zip(window, pool.map(line, window), strict=True):
                    if isinstance(made, OSError):
                        self.ledger.start([item.mark(verdict, settings)])
                        fault = Fault("picture", " ".join(str(made).split()))
                        self.ledger.record([change_by_fault(item, fault, attempts=0)])
                        self.settled()
                    else:
                        yield item, verdict, made

    def _upload(self, path: Path) -> FileObject:
        return self.endpoint.client.files.create(file=(path.name, path.read_bytes()), purpose="batch")

    def _call(self, send: Callable[[], T]) -> T:
        try:
            return self.endpoint.call(send)
        except RequestFailed as error:
            what = "run again to go on" if error.fault.kind == "retry" else "mend that and run again"
            raise LabelError(f"batch: {error.fault.detail}; {what}") from error

    def _create(self, token: str, file: str) -> None:
        tried = False

        def send() -> Batch:
            nonlocal tried
            # the answer to an earlier try may have got lost: a batch made twice is paid for twice
            known = self._find(token) if tried else None
            tried = True
            return known or self.endpoint.client.batches.create(
                input_file_id=file,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={_TOKEN: token},
            )

        try:
            batch = self._call(send)
        except LabelError as error:
            if isinstance(error.__cause__, RequestFailed) and error.__cause__.fault.kind != "retry":
                self.ledger.drop_batch(token)  # refused, so there is none
            raise
        self.ledger.batch_created(token, batch.id, file)

    def _find(self, token: str) -> Batch | None:
        return next(
            (
                batch
                for batch in self.endpoint.client.batches.list(limit=100)
                if (batch.metadata or {}).get(_TOKEN) == token
            ),
            None,
        )

    def _find_again(self, batch: BatchRow) -> None:
        """A run was killed while it made this one: it may be at the server, or its file, or neither."""
        known = self._call(lambda: self._find(batch.token))
        if known is not None:
            self.ledger.batch_created(batch.token, known.id, known.input_file_id)
            return
        name = f"batch-{batch.token}.jsonl"
        files = self._call(lambda: list(self.endpoint.client.files.list(purpose="batch", limit=100)))
        file = next((file.id for file in files if file.filename == name and file.bytes == batch.bytes), None)
        if file is None:
            self.ledger.drop_batch(batch.token)
        else:
            self._create(batch.token, file)

    # fetching

    def _fetch_all(self) -> bool:
        """Takes in every batch that has ended; whether that left something to be asked."""
        something_open = False
        for row in self.ledger.batches():
            batch = self._call(partial(self._retrieve, row))
            if batch.status in _WORKING:
                continue
            if batch.status == "failed":
                self._failed(row, batch)
            else:  # completed, expired, cancelled: what was answered until then is there, and paid for
                self._take_in(row, batch)
            something_open = True
        return something_open

    def _retrieve(self, row: BatchRow) -> Batch:
        assert row.id is not None, "a batch without the server's id was found again, or dropped, before"
        return self.endpoint.client.batches.retrieve(row.id)

    def _failed(self, row: BatchRow, batch: Batch) -> None:
        """None of it was asked."""
        errors = (batch.errors.data if batch.errors else None) or []
        told = "; ".join(f"{error.code}: {error.message}" for error in errors[:3]) or "no reason given"
        self._forget(row)
        self._failed_batches += 1
        if not any(error.code in _LIMITS for error in errors):
            raise LabelError(f"batch {row.id} failed: {told}; mend that and run again")
        if self._failed_batches >= self.settings.give_up_after:
            raise LabelError(
                f"{self._failed_batches} batches found no room, the last: {told}; set label.batch_requests or "
                "label.batches_at_once lower and run again"
            )
        self._crowded = True

    def _forget(self, row: BatchRow) -> None:
        self.budget.settle(sum(reserved for _, reserved in self.ledger.members(row.token)), 0.0)
        self.ledger.drop_batch(row.token)
        self._delete_file(row)

    def _delete_file(self, row: BatchRow) -> None:
        """The pictures at the server; its storage is limited."""
        import openai

        assert row.file is not None, "a batch that was made has its file"
        with suppress(openai.OpenAIError):  # costs nothing but room there
            self.endpoint.client.files.delete(row.file)

    def _take_in(self, row: BatchRow, batch: Batch) -> None:
        """All its answers and the batch's end in one transaction."""
        members = dict(self.ledger.members(row.token))
        items = {
            item.key: item for _, item in self.work.rows() if isinstance(item, Item) and item.key in members
        }
        changes: dict[str, Change] = {}
        faults: list[Fault | None] = []
        spent = 0.0
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            content = self._call(partial(self._download, file))
            for line in content.split(b"\n"):
                if not line.strip():
                    continue
                key, answer = _read_line(line, f"batch {row.id}, file {file}")
                item = items.get(key)
                if item is None or key in changes:
                    continue  # not of these records, or not asked
                if isinstance(answer, Fault):
                    faults.append(answer)
                    changes[key] = self._change(item, answer)
                else:
                    faults.append(None)
                    verdict = judge(self.ledger.get(key), item.ingredients, self.settings)
                    reply = make_reply(answer, item.estimate(verdict, self.settings), self.settings)
                    spent += reply.price
                    changes[key] = change_by_reply(self.ledger, item, reply, self.settings)
        unheard = Fault("retry", f"batch {row.id} ended as {batch.status} without an answer")
        for key, item in items.items():
            if key not in changes:
                faults.append(unheard)
                changes[key] = self._change(item, unheard)
        self.ledger.record(list(changes.values()), done_batch=row.token)
        self._crowded, self._failed_batches = False, 0
        self.budget.settle(sum(members.values()), spent)
        self._delete_file(row)
        for change in changes.values():
            if change.status != "open":
                self.settled()
        for fault in faults:
            self._misses.count(fault)

    def _download(self, file: str) -> bytes:
        return self.endpoint.client.files.content(file).read()

    def _change(self, item: Item, fault: Fault) -> Change:
        self._tries[item.key] += 1
        if fault.kind == "retry" and self._tries[item.key] <= self.settings.retries:
            return Change(item.key, "open", attempts=1)
        return change_by_fault(item, fault)


def _nothing() -> None:
    pass


def _read_line(line: bytes, where: str) -> tuple[str, dict[str, Any] | Fault]:
    """Key of one line of an output or error file, and its completion or why there is none."""
    try:
        entry = json.loads(line)
        key, response, error = entry["custom_id"], entry.get("response"), entry.get("error")
        status = response["status_code"] if response else None
    except (ValueError, TypeError, KeyError) as problem:
        raise LabelError(f"{where}: not a line of a batch's output: {line[:80]!r} ({problem})") from None
    if status == 200:
        try:
            return key, check_completion(response["body"])
        except RequestFailed as failed:
            return key, failed.fault
    if status is not None:
        body = response.get("body") or {}
        return key, fault_of_status(status, body.get("error", body) if isinstance(body, dict) else body)
    told = error.get("message") or error.get("code") if isinstance(error, dict) else error
    return key, Fault("retry", f"batch: {told}")
