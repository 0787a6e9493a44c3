"""The thread that owns the model, and the queue in front of it."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence

from rode.serving.batch import Failed, Job, run
from rode.serving.errors import ApiError
from rode.serving.limits import Limits
from rode.serving.metrics import Metrics

logger = logging.getLogger(__name__)


class Slot:
    """A place among the requests that the server takes on; given back once."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._held, self.preparing = engine, True, True

    def release(self) -> None:
        if self._held:
            self._held = False
            self._engine._leave(self)


class Engine:
    """Answers requests in batches: the one that has waited longest, and others to the same model that wait too.

    A batch is one call of `generate`. A request that comes while it runs waits for its end.

    Args:
        limits: of the server. metrics: where it counts.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._slots: set[Slot] = set()
        self._closing = False
        self._batch_seconds = 1.0  # a running mean, for Retry-After
        self._thread = threading.Thread(target=self._loop, name="rode-serve-model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def admit(self) -> Slot:
        """A slot for one more request, before its body is read.

        Raises:
            ApiError: 429, there are as many as the server takes on.
        """
        with self._changed:
            if len(self._slots) >= self.limits.queue + self.limits.batch_size:
                batches = math.ceil(len(self._slots) / self.limits.batch_size)
                seconds = min(60, max(1, math.ceil(batches * self._batch_seconds)))
                raise ApiError(
                    429,
                    f"the server has {len(self._slots)} requests already; ask again in {seconds} s",
                    code="queue_full",
                    retry_after=seconds,
                )
            slot = Slot(self)
            self._slots.add(slot)
            return slot

    def _leave(self, slot: Slot) -> None:
        with self._changed:
            self._slots.discard(slot)
            self._changed.notify_all()

    def submit(self, job: Job, slot: Slot) -> None:
        """Put a job into the queue."""
        with self._changed:
            if self._closing or not self.alive:
                raise ApiError(503, "the server is shutting down")
            slot.preparing = False
            self._waiting.append(job)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this answer: it leaves the queue, or its row ends with the next token."""
        job.cancelled.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self.metrics.waiting.set(len(self._waiting))

    def close(self) -> None:
        """End the thread once the queue is empty."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _take(self) -> list[Job]:
        """The next batch; empty when the engine closes."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return []
                # Requests that came together are read one after the other: without a look at those that are being read,
                # the first of them would be answered alone.
                self._changed.wait_for(self._gathered, timeout=self.limits.gather)
                if self._waiting:  # not cancelled meanwhile
                    break
            model = self._waiting[0].model
            batch = [job for job in self._waiting if job.model is model][: self.limits.batch_size]
            for job in batch:
                self._waiting.remove(job)
            self.metrics.waiting.set(len(self._waiting))
            return batch

    def _gathered(self) -> bool:
        return len(self._waiting) >= self.limits.batch_size or not any(slot.preparing for slot in self._slots)

    def _loop(self) -> None:
        while batch := self._take():
            started = time.monotonic()
            self.metrics.batches.observe(len(batch))
            self.metrics.running.set(len(batch))
            self._answer(batch)
            self.metrics.running.set(0)
            self._batch_seconds += 0.2 * (time.monotonic() - started - self._batch_seconds)
            del batch  # the pictures of a batch are not kept until the next one

    def _answer(self, jobs: Sequence[Job]) -> None:
        failed = self._run(jobs)
        if failed is None:
            return
        # outside of `except`: what the failed batch held is free by now
        alone = len(jobs) > 1 and not any(job.tokens for job in jobs)
        for job in jobs:
            if alone:  # one request may be the reason, or their number
                self._answer([job])
            else:
                job.emit(Failed(ApiError(500, f"the model failed ({failed}); the server's log says where")))

    def _run(self, jobs: Sequence[Job]) -> str | None:
        """Answer a batch; the name of the error that ended it, or None."""
        try:
            run(jobs)
        except Exception as error:  # whatever a model raises: the server goes on
            logger.exception("a batch of %d requests to %s failed", len(jobs), jobs[0].model.name)
            return type(error).__name__
        return None
