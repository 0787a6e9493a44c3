"""Live mode: so many requests under way at once, each answer in the ledger before anything follows from it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from rode_food.unifood.label.answers import Misses, change_by_fault, change_by_reply, make_reply
from rode_food.unifood.label.client import Endpoint, Fault, RequestFailed, Stopped
from rode_food.unifood.label.errors import LabelError
from rode_food.unifood.label.ledger import Change, Ledger
from rode_food.unifood.label.price import Budget, price_at_most
from rode_food.unifood.label.prompt import encode_picture, request_body
from rode_food.unifood.label.settings import LabelSettings
from rode_food.unifood.label.work import Item, Verdict, judge


@dataclass(frozen=True)
class Outcome:
    """The result of one content's request.

    Attributes:
        raw: the answer, or None.
        fault: why there is none; None as well where it was not sent.
        attempts: requests sent.
        reserved: money set aside for it.
        lost: what requests without an answer may have cost.
    """

    raw: dict[str, Any] | None
    fault: Fault | None
    attempts: int
    reserved: float
    lost: float


def ask_live(
    work: Iterator[tuple[Item, Verdict]],
    ledger: Ledger,
    endpoint: Endpoint,
    budget: Budget,
    settings: LabelSettings,
    settled: Callable[[], object],
) -> bool:
    """Asks all of `work`; what fails its check is asked again once, right away.

    Returns:
        False if the budget ended first.

    Raises:
        LabelError: the job cannot go on; answers under way were waited for and kept.
    """
    again: deque[tuple[Item, Verdict]] = deque()
    flying: dict[Future[Outcome], tuple[Item, Verdict]] = {}
    misses = Misses(settings.give_up_after)

    def land(future: Future[Outcome]) -> Fault | None:
        """Into the ledger first; the fault of a request that failed."""
        item, verdict = flying.pop(future)
        outcome = future.result()
        reply = None
        if outcome.raw is not None:
            reply = make_reply(outcome.raw, item.estimate(verdict, settings), settings)
            change = change_by_reply(ledger, item, reply, settings, outcome.attempts, outcome.lost)
        elif outcome.fault is not None:
            change = change_by_fault(item, outcome.fault, outcome.attempts, outcome.lost)
        else:
            change = Change(item.key, "open", attempts=outcome.attempts, lost=outcome.lost)
        budget.settle(outcome.reserved, outcome.lost + (reply.price if reply else 0.0))
        ledger.record([change])
        if change.status != "open":
            settled()
        elif outcome.fault is None:  # asked again, or there was no money for another try
            again.append((item, judge(ledger.get(item.key), item.ingredients, settings)))
        return outcome.fault

    with ThreadPoolExecutor(settings.concurrency, thread_name_prefix="label") as pool:
        try:
            within_budget = True
            while True:
                starting: list[tuple[Item, Verdict]] = []
                while len(flying) + len(starting) < settings.concurrency:
                    next_one = again.popleft() if again else next(work, None)
                    if next_one is None:
                        break
                    if not budget.reserve(
                        price_at_most(next_one[0].estimate(next_one[1], settings), settings)
                    ):
                        within_budget = False
                        again.appendleft(next_one)  # it may fit when those under way turn out cheaper
                        break
                    within_budget = True
                    starting.append(next_one)
                if starting:
                    _ = endpoint.client  # its errors come before anything is marked
                    ledger.start([item.mark(verdict, settings) for item, verdict in starting])
                for item, verdict in starting:
                    flying[pool.submit(_ask, endpoint, budget, settings, item, verdict)] = (item, verdict)
                if not flying:
                    return within_budget
                done, _ = wait(flying, return_when=FIRST_COMPLETED)
                for fault in [land(future) for future in done]:
                    misses.count(fault)
        except BaseException as error:
            # what is under way may be answered, and is paid for then: waited for, kept, and only then the error
            endpoint.stop.set()
            not_kept = 0
            for future in list(flying):
                try:
                    land(future)
                except Exception:
                    not_kept += 1
            if not_kept and isinstance(error, LabelError):
                raise LabelError(f"{error}; {not_kept} answers could not be kept") from error
            raise


def _ask(
    endpoint: Endpoint, budget: Budget, settings: LabelSettings, item: Item, verdict: Verdict
) -> Outcome:
    """In a thread of its own; touches no ledger."""
    at_most = price_at_most(item.estimate(verdict, settings), settings)
    reserved, lost, attempts = at_most, 0.0, 0

    def sent() -> None:
        nonlocal attempts
        attempts += 1

    def failed(fault: Fault) -> None:
        nonlocal lost, reserved
        if fault.lost:
            lost += at_most
            if not budget.reserve(at_most):  # the next try needs money of its own
                raise Stopped
            reserved += at_most

    try:
        picture = encode_picture(item.image, settings.image_side)
    except OSError as error:
        return Outcome(None, Fault("picture", " ".join(str(error).split())), 0, reserved, 0.0)
    try:
        body = request_body(picture, item.lines, settings, verdict.failed)
        raw = endpoint.call(lambda: endpoint.complete(body), sent=sent, failed=failed)
    except RequestFailed as error:
        return Outcome(None, error.fault, attempts, reserved, lost)
    except Stopped:
        return Outcome(None, None, attempts, reserved, lost)
    return Outcome(raw, None, attempts, reserved, lost)
